r"""Averages of checkpoints: phi = sum_i w_i phi_i, over weights, tensor by tensor.

Full models are read from their safetensors shards a block at a time, summed in float64 and rounded once to
the type they are stored in, so copies of one model average to itself bit for bit and the order of the members
does not matter. The result has the shards, the configuration and the tokenizer of the first member.

LoRA adapters are averaged as what they do, sum_i w_i s_i B_i A_i: the factors are put side by side, the rank
is the sum of the ranks. (Averages of A and of B by themselves, and PEFT's ``linear``, are something else.)
Modules that were trained in full beside the adapters, such as the head of a reward model, are averaged as
weights.

Nothing is averaged that does not belong together; see :class:`MergeError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from posttrain.evaluation.checkpoint import INDEX, Checkpoint, tied_heads
from posttrain.models import load
from posttrain.models.load import ADAPTER_CONFIG, BUNDLED_BASE
from posttrain.selection.delta_apply import files_beside
from posttrain.selection.delta_file import save_tensors
from posttrain.stored import stored_json

RECORD = "posttrain_merge.json"
"""File beside an average that says what it is the average of."""

_ADAPTER = "adapter_model.safetensors"
# of a configuration: where it came from, how it was trained, how it runs
_FREE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
_DROPOUT = ("dropout", "pdrop", "layerdrop")
# of a LoRA configuration: what may differ between members, and what is taken from the sum
_OWN = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "inference_mode",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
}
_SPECIAL = (
    "use_dora",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "mica", "eva")


class MergeError(ValueError):
    """Members that do not belong together: other tensors, types, tokenizers, heads or bases."""


@dataclass(frozen=True)
class Merged:
    """An average.

    Attributes:
        folder: Where it lies.
        kind: ``full`` or ``adapter``.
        members: Folders of the members.
        weights: Their weights, which sum to 1.
        tensors: Number of tensors written.
        parameters: Scalars in them.
        rank: Largest rank of an averaged adapter, else None.
    """

    folder: str
    kind: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    tensors: int
    parameters: int
    rank: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return asdict(self)


def average(
    members: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] | None = None
) -> Merged:
    """Write the average of several full models, or of several LoRA adapters of one base.

    Args:
        members: Folders; of full models also Hub ids.
        out: Folder to write; new or empty.
        weights: One per member, not negative; divided by their sum. Equal ones when None.

    Raises:
        MergeError: They cannot be averaged; the message names file and tensor. Nothing is left in ``out``.
        posttrain.models.load.ModelLoadError: A member cannot be read.
        OSError: The result cannot be written; nothing is left of it.
    """
    shares = normalised(weights, len(members))
    folders = [
        str(member) if found is None else str(found) for member in members for found in [_local(member)]
    ]
    adapters = [(Path(folder) / ADAPTER_CONFIG).is_file() for folder in folders]
    if any(adapters) and not all(adapters):
        raise MergeError(
            f"{folders[adapters.index(True)]} is an adapter and {folders[adapters.index(False)]} is not: "
            "merge the adapter into its base first (posttrain export RUN --format merged)"
        )
    # a member without weight adds nothing, but ranks to an adapter
    kept = [(folder, share) for folder, share in zip(folders, shares, strict=True) if share > 0]
    names, used = [folder for folder, _ in kept], [share for _, share in kept]
    with _finished(Path(out)) as partial:
        job = _average_adapters if adapters[0] else _average_full
        about = job(names, used, partial)
        merged = Merged(str(Path(out).expanduser()), members=tuple(names), weights=tuple(used), **about)
        record = json.dumps(merged.to_dict() | {"folder": None}, indent=1)
        (partial / RECORD).write_text(record + "\n", encoding="utf-8")
    return merged


def _local(member: str | Path) -> Path | None:
    """Return the folder of a member, None for a Hub id.

    Raises:
        ModelLoadError: It looks like a folder, and there is none.
    """
    folder = Path(member).expanduser()
    if folder.exists():
        return folder
    load._refuse_missing_folder(str(member))
    return None


def normalised(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return ``count`` weights that sum to 1.

    Raises:
        MergeError: There are no members, or the weights are not as many, negative, not finite or all 0.
    """
    if count < 1:
        raise MergeError("an average needs members, found none")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = math.fsum(given)
    if len(given) != count or any(weight < 0 or not math.isfinite(weight) for weight in given) or total <= 0:
        raise MergeError(f"{count} members need {count} weights >= 0 that are not all 0, found {given}")
    return tuple(weight / total for weight in given)


@contextmanager
def _finished(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which gets its name once it is complete."""
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} is in use: give a new or empty folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# ---- full models ------------------------------------------------------------------------------------------


def _average_full(folders: Sequence[str], weights: Sequence[float], out: Path) -> dict[str, Any]:
    with ExitStack() as stack:
        sides = [stack.enter_context(Checkpoint(folder, beside=True)) for folder in folders]
        tied = _check_full(sides)
        first = sides[0]
        shards: dict[Path, list[str]] = {}
        for name, stored in first.tensors.items():
            shards.setdefault(stored.file, []).append(name)
        for shard, names in shards.items():
            found = {name: _mean(sides, weights, name, tied) for name in names}
            save_tensors(found, out / shard.name, {"format": "pt"})
        for path in files_beside(first.folder):
            shutil.copyfile(path, out / path.name)
        if (first.folder / INDEX).is_file():
            shutil.copyfile(first.folder / INDEX, out / INDEX)
        count = sum(stored.elements for stored in first.tensors.values())
        return {"kind": "full", "tensors": len(first.tensors), "parameters": count}


def _check_full(sides: Sequence[Checkpoint]) -> dict[str, str]:
    """Refuse what does not belong together; return the heads that are the input embedding."""
    first = sides[0]
    tied = tied_heads(sides)
    for other in sides[1:]:
        _compare_settings(_settings(first.config), _settings(other.config), first.path, other.path)
        _compare_tokenizers(first.folder, other.folder)
        here, there = set(first.tensors) - tied.keys(), set(other.tensors) - tied.keys()
        if here != there:
            only = sorted(here ^ there)
            where = first.path if only[0] in here else other.path
            raise MergeError(
                f"{first.path} and {other.path} do not have the same tensors: {only[0]} is only in {where}"
                + (f" (and {len(only) - 1} more)" if len(only) > 1 else "")
                + ". Members of an average are one architecture with one head"
            )
        for name in sorted(here):
            one, two = first.tensors[name], other.tensors[name]
            if (one.shape, one.dtype) != (two.shape, two.dtype):
                raise MergeError(
                    f"tensor {name} is {one.dtype} {list(one.shape)} in {one.file} and {two.dtype} "
                    f"{list(two.shape)} in {two.file}: save both in one type and shape"
                )
    return tied


def _mean(
    sides: Sequence[Checkpoint], weights: Sequence[float], name: str, tied: dict[str, str]
) -> torch.Tensor:
    stored = sides[0].tensors[name]
    names = [name if name in side.tensors else tied[name] for side in sides]
    if stored.torch_dtype is None:  # positions and the like
        values = sides[0].tensor(name)
        for side, own in zip(sides[1:], names[1:], strict=True):
            if not torch.equal(side.tensor(own), values):
                raise MergeError(
                    f"tensor {name} holds {stored.dtype} numbers, which have no average, and they differ "
                    f"between {stored.file} and {side.tensors[own].file}"
                )
        return values
    blocks = [side.blocks(own) for side, own in zip(sides, names, strict=True)]
    files = [side.tensors[own].file for side, own in zip(sides, names, strict=True)]
    parts = [_weighted(group, weights, name, files) for group in zip(*blocks, strict=True)]
    return torch.cat(parts).reshape(stored.shape) if parts else sides[0].tensor(name)


def _weighted(
    values: Sequence[torch.Tensor], weights: Sequence[float], name: str, files: Sequence[Path]
) -> torch.Tensor:
    """Return the weighted sum in float64, rounded once."""
    total = torch.zeros(values[0].shape, dtype=torch.float64)
    members = zip(values, weights, files, strict=True)
    # in one order whatever the order given: a sum that lies between two numbers would else go either way
    for value, weight, file in sorted(members, key=lambda member: (member[1], str(member[2]))):
        wide = value.double()
        if not torch.isfinite(wide).all():
            raise MergeError(f"tensor {name} of {file} holds numbers that are not finite: leave it out")
        total.add_(wide, alpha=weight)
    return total.to(values[0].dtype)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        if key in _FREE or any(word in key for word in _DROPOUT):
            continue
        kept[key] = _settings(value) if isinstance(value, dict) else value
    return kept


def _compare_settings(one: dict[str, Any], two: dict[str, Any], here: str, there: str) -> None:
    different = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
    if different:
        key = different[0]
        raise MergeError(
            f"config.json of {here} and {there} differ in {key} ({one.get(key)!r} and {two.get(key)!r}): "
            "members of an average are one architecture with one head and one set of token ids"
        )


def _compare_tokenizers(one: Path, two: Path) -> None:
    here, there = _tokenizer(one), _tokenizer(two)
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise MergeError(
                f"the tokenizers of {one} and {two} differ in {key}: embeddings can only be averaged where "
                "they stand for the same tokens"
            )


def _tokenizer(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    path = folder / "tokenizer.json"
    if path.is_file():
        content = stored_json(path)
        # what the last call padded and cut to
        found |= {
            f"{key} (tokenizer.json)": v for key, v in content.items() if key not in ("padding", "truncation")
        }
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template = stored_json(settings).get("chat_template")
        found["the chat template"] = template
    if (folder / "chat_template.jinja").is_file():
        found["the chat template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return found


# ---- adapters ---------------------------------------------------------------------------------------------


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MergeError(
            f"{file} cannot be read, it is damaged or cut short: copy it again [{error}]"
        ) from error


def _average_adapters(folders: Sequence[str], weights: Sequence[float], out: Path) -> dict[str, Any]:
    paths = [Path(folder) for folder in folders]
    configs = [stored_json(path / ADAPTER_CONFIG) for path in paths]
    _check_adapters(paths, configs)
    for path, config in zip(paths, configs, strict=True):
        alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
        numbers = [alpha, *(patterns.values() if isinstance(patterns, dict) else [patterns])]
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise MergeError(
                f"{path / ADAPTER_CONFIG}: lora_alpha {alpha!r} with alpha_pattern {patterns!r} where "
                "numbers are needed; the file is damaged, copy it again"
            )
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path / _ADAPTER)) for path in paths]
        names = [set(file.keys()) for file in files]
        for path, own in zip(paths[1:], names[1:], strict=True):
            if own != names[0]:
                raise MergeError(
                    f"{paths[0] / _ADAPTER} and {path / _ADAPTER} do not hold the same tensors, for example "
                    f"{sorted(own ^ names[0])[0]}"
                )
        tensors: dict[str, torch.Tensor] = {}
        ranks: dict[str, int] = {}
        for name in sorted(names[0]):
            values = [file.get_tensor(name) for file in files]
            tensors[name] = _adapter_tensor(name, values, weights, configs, paths, files, ranks)
    save_tensors(tensors, out / _ADAPTER, {"format": "pt"})
    for path in files_beside(paths[0]):
        shutil.copyfile(path, out / path.name)
    if (paths[0] / BUNDLED_BASE).is_dir():
        shutil.copytree(paths[0] / BUNDLED_BASE, out / BUNDLED_BASE)
    rank = max(ranks.values())
    patterns = {module: own for module, own in ranks.items() if own != rank}
    config = configs[0] | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2, sort_keys=True)
    (out / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    count = sum(tensor.numel() for tensor in tensors.values())
    return {"kind": "adapter", "tensors": len(tensors), "parameters": count, "rank": rank}


def _adapter_tensor(
    name: str,
    values: Sequence[torch.Tensor],
    weights: Sequence[float],
    configs: Sequence[dict[str, Any]],
    paths: Sequence[Path],
    files: Sequence[Any],
    ranks: dict[str, int],
) -> torch.Tensor:
    """Return a tensor of the average: factors side by side, everything else as weights."""
    module, _, kind = name.partition(".lora_")
    where = [path / _ADAPTER for path in paths]
    if not kind:  # trained in full
        _same_form(name, values, where)
        return _weighted(values, weights, name, where)
    kind = kind.removesuffix(".weight")
    module = module.removeprefix("base_model.model.")
    if kind in ("A", "embedding_A"):
        ranks[module] = sum(value.shape[0] for value in values)
        return torch.cat(list(values), dim=0)
    if kind not in ("B", "embedding_B", "B.bias"):
        raise MergeError(
            f"tensor {name} of {where[0]} is no plain LoRA factor, so adapters that have it cannot be added: "
            "merge each into its base (posttrain export RUN --format merged) and average those"
        )
    factor = name if kind != "B.bias" else name.replace(".bias", ".weight")
    scales = [
        _scale(config, module, file.get_tensor(factor).shape[1])
        for config, file in zip(configs, files, strict=True)
    ]
    if kind == "B.bias":
        return _weighted(values, [w * s for w, s in zip(weights, scales, strict=True)], name, where)
    parts = [
        (value.double() * (weight * scale)).to(value.dtype)
        for value, weight, scale in zip(values, weights, scales, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), module)
    alpha = float(patterns.get(key, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _same_form(name: str, values: Sequence[torch.Tensor], files: Sequence[Path]) -> None:
    for value, file in zip(values[1:], files[1:], strict=True):
        if (value.shape, value.dtype) != (values[0].shape, values[0].dtype):
            raise MergeError(
                f"tensor {name} is {values[0].dtype} {list(values[0].shape)} in {files[0]} and {value.dtype} "
                f"{list(value.shape)} in {file}"
            )


def _check_adapters(paths: Sequence[Path], configs: Sequence[dict[str, Any]]) -> None:
    defaults = {key: value for key, value in LoraConfig().to_dict().items() if key not in _OWN}
    for path, config in zip(paths, configs, strict=True):
        kind = config.get("peft_type")
        init = config.get("init_lora_weights", True)
        reason = None
        if kind != "LORA":
            reason = f"is an adapter of type {kind}"
        elif special := [key for key in _SPECIAL if config.get(key)]:
            reason = f"uses {special[0]}, whose update is no sum of products of two factors"
        elif init not in _PLAIN_STARTS:
            reason = f"started with init_lora_weights={init!r}, which changes the base"
        if reason:
            raise MergeError(
                f"{path} {reason}: merge it into its base (posttrain export RUN --format merged) and average "
                "full models"
            )
    first = _free_of_order(defaults | configs[0])
    for path, config in zip(paths[1:], configs[1:], strict=True):
        other = _free_of_order(defaults | config)
        for key in sorted(first.keys() | other.keys()):
            if key not in _OWN and first.get(key) != other.get(key):
                raise MergeError(
                    f"the adapters {paths[0]} and {path} differ in {key} ({first.get(key)!r} and "
                    f"{other.get(key)!r})"
                )
        _same_base(paths[0], configs[0], path, config)
        _compare_tokenizers(paths[0], path)


def _free_of_order(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in config.items()
    }


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _same_base(one: Path, here: dict[str, Any], two: Path, there: dict[str, Any]) -> None:
    bundled = [(path / BUNDLED_BASE) for path in (one, two)]
    if all(folder.is_dir() for folder in bundled):
        if _digests(bundled[0]) == _digests(bundled[1]):
            return
    elif [here.get(key) for key in ("base_model_name_or_path", "revision")] == [
        there.get(key) for key in ("base_model_name_or_path", "revision")
    ]:
        return
    raise MergeError(
        f"the adapters {one} and {two} do not have one base ({here.get('base_model_name_or_path')!r} and "
        f"{there.get('base_model_name_or_path')!r}): merge each into its own (posttrain export RUN --format "
        "merged) and average full models"
    )
