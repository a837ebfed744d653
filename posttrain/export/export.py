"""Writing a trained model to a folder, and reading it back before calling it done.

An export is written beside its final place, reloaded with plain transformers and PEFT, compared with the
trained model on probe inputs, and only then renamed. The trained model is never modified: merging happens on
a copy, in fp32, and the live weights are hashed before and after.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import posttrain
from posttrain.export.card import CardData, write_card
from posttrain.export.verify import (
    Comparison,
    compare,
    file_fingerprints,
    logits,
    probe_inputs,
    weights_fingerprint,
)
from posttrain.models.load import ADAPTER_CONFIG, BUNDLED_BASE, DELTA_FILE
from posttrain.models.scoring import no_report
from posttrain.run.directory import RunDirectory
from posttrain.selection.delta import write_delta
from posttrain.selection.delta_apply import files_beside, load_delta
from posttrain.selection.delta_file import as_os_error
from posttrain.stored import StoredFileError, stored_json

MARKER = "posttrain_export.json"
"""Written last: says that the folder is ours, was verified, and what its files' fingerprints are."""

UNHASHED = (MARKER, "README.md", ".gitattributes")
"""Files one may edit after the export without making it unverified; the Hub adds the last one."""

Format = Literal["auto", "adapter", "merged", "full", "delta"]
_Model = PreTrainedModel | PeftModel


class ExportError(RuntimeError):
    """The model cannot be exported as asked; nothing was left under the target's name."""


class ExportRequestError(ExportError):
    """Another format, base or target has to be asked for."""


@dataclass(frozen=True)
class ExportResult:
    """A finished, verified export.

    Attributes:
        folder: Where it is.
        format: ``adapter``, ``merged``, ``full`` or ``delta``.
        base: Address of the base (Hub id or absolute folder) of an adapter or delta; None for the others.
        base_revision: Commit of a base from the Hub, of which an adapter or delta is, or that was trained on.
        base_bundled: Whether the base was saved in ``folder/base``.
        dtype: Type of the weights.
        comparison: Logits of the reloaded model against the trained one.
        bytes: Size of the folder.
        density: Share of the weights that a delta holds; None for the other formats.
    """

    folder: str
    format: str
    base: str | None
    base_bundled: bool
    dtype: str
    comparison: Comparison
    bytes: int
    density: float | None = None
    base_revision: str | None = None


def export_model(
    model: _Model,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    format: Format = "auto",
    card: CardData | None = None,
    probe_texts: Sequence[str] = ("Once upon a time, 2 + 2 = ",),
    base_path: str | None = None,
    base_revision: str | None = None,
    bundle_base: bool | None = None,
    about: Any = None,
    extras: Sequence[Path] = (),
    overwrite: bool = False,
) -> ExportResult:
    """Export a trained model, verified by reloading it.

    Args:
        model: The trained model, unwrapped (not a DDP, FSDP or DeepSpeed wrapper). Left bit-identical.
        tokenizer: Saved beside the weights, chat template included.
        out_dir: Target folder. An earlier export of ours is replaced once the new one is verified.
        format: ``adapter`` (PEFT), ``merged`` (adapter folded into the weights), ``full`` (a model without
            adapter), ``delta`` (the weights that differ from the base's, an adapter folded in; see
            :mod:`posttrain.selection.delta`), or ``auto``: adapter for a ``PeftModel``, full otherwise.
        card: What the model card tells; see :class:`posttrain.export.card.CardData`.
        probe_texts: Texts whose logits are compared, besides ids spread over the vocabulary.
        base_path: Hub id or folder of the base of an adapter or delta; for an adapter what the base model
            remembers when None.
        base_revision: Commit or branch of a base on the Hub that ``base_path`` names.
        bundle_base: Save the base in ``out_dir/base``, so that the export can be moved or pushed on its own.
            None: when the base has no address because it was built in memory, or the run that is exported
            made it itself (a warm start).
        about: JSON to keep in a delta, for example the selection that was trained.
        extras: Files to copy beside the model, for example what a method trained besides.
        overwrite: Replace a folder that is not an export of ours; its content is kept in ``NAME.old``.

    Raises:
        OSError: It cannot be written, for example because the disk is full; nothing is left of it, and an
            earlier export is as it was.
        posttrain.selection.delta_file.DeltaError: A delta was asked for, and nothing changed, too
            much did, or the base is another model.
        ExportError: The format does not fit the model, the target is in use, the weights are sharded or
            quantised, the reloaded model differs from the trained one, or a merge changes nothing.
    """
    target = Path(out_dir).expanduser().absolute()
    kind = _resolve_format(model, format)
    _refuse_sharded(model)
    _refuse_used_target(target, overwrite)
    probes = probe_inputs(model, tokenizer, probe_texts)
    before = weights_fingerprint(model)
    trained = logits(model, probes)
    if not all(row.isfinite().all() for row in trained):
        raise ExportError(
            "the trained model gives logits that are not finite: export the last good checkpoint instead"
        )
    base, bundled, base_logits, density = None, False, None, None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base_logits = logits(model, probes)
        base = _base_address(model, base_path)
        bundled = kind == "adapter" and (_needs_bundle(base, target) if bundle_base is None else bundle_base)
    if kind == "delta":
        base = _base_address(model, base_path)
        if base is None or (base_path is None and not isinstance(model, PeftModel)):
            raise ExportRequestError(
                "a delta needs the base the training started from: name it in base_path (--base)"
            )
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        if kind == "adapter":
            assert isinstance(model, PeftModel)
            recorded = str(target / BUNDLED_BASE) if bundled else base
            commit = base_revision if base_path else _commit(model)
            commit = None if bundled else commit
            _save_adapter(model, partial, recorded, commit, bundled=bundled)
            if bundled:
                _save_weights(_base_copy(model), partial / BUNDLED_BASE)
                tokenizer.save_pretrained(partial / BUNDLED_BASE)
            reload_base = str(partial / BUNDLED_BASE) if bundled else base
        elif kind == "delta":
            assert base is not None
            density, commit = _save_delta(model, partial, base, base_revision, about)
            reload_base = None  # the file says it
        else:
            _save_weights(_merged_copy(model) if isinstance(model, PeftModel) else model, partial)
            reload_base, commit = None, _commit(model)
        tokenizer.save_pretrained(partial)
        for path in extras:
            shutil.copyfile(path, partial / path.name)
        comparison, found = _reload_and_compare(
            partial, reload_base, model, tokenizer, probes, trained, base_logits
        )
        if kind == "adapter" and not bundled and found is not None and found != commit:
            commit = found  # of the base that base_path names, now that it is known to be the right one
            _record_revision(partial, commit)
        if weights_fingerprint(model) != before:
            raise ExportError(
                "the export changed the weights of the trained model; this is a bug, please report it"
            )
        result = ExportResult(
            folder=str(target),
            format=kind,
            base=base if kind == "delta" or (kind == "adapter" and not bundled) else None,
            base_bundled=bundled,
            dtype=str(_dtype(model)).removeprefix("torch."),
            comparison=comparison,
            bytes=sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()),
            density=density,
            base_revision=commit,
        )
        write_card(partial, card or {}, result, prompt=probe_texts[0] if probe_texts else None)
        _write_marker(partial, result)
        _put_in_place(partial, target)
    except SafetensorError as error:
        _remove(partial)
        raise as_os_error(error, target) from error
    except BaseException:
        _remove(partial)
        raise
    return result


def is_verified(folder: str | Path) -> str | None:
    """Return why ``folder`` is not a verified export of ours, or None when it is."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} does not exist"
    if not (folder / MARKER).is_file():
        return f"{folder} holds no {MARKER}: it was not written by posttrain export, or the export failed"
    try:
        marker = stored_json(folder / MARKER)
    except StoredFileError as error:
        return str(error)
    expected = marker.get("files")
    if not isinstance(expected, dict) or not {"format", "base", "comparison"} <= marker.keys():
        return f"{folder / MARKER} is damaged: export again"
    found = file_fingerprints(folder, leave_out=UNHASHED)
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{folder} was changed after the export: {', '.join(changed)}" if changed else None


# ---- what may be exported ---------------------------------------------------------------------------------


def _resolve_format(model: _Model, format: Format) -> str:
    adapter = isinstance(model, PeftModel)
    kind = format if format != "auto" else "adapter" if adapter else "full"
    if kind == "full" and adapter:
        raise ExportRequestError(
            "format 'full' does not fit a model with an adapter: use 'adapter', or 'merged' to fold it "
            "into the weights"
        )
    if kind in ("adapter", "merged") and not adapter:
        raise ExportRequestError(
            f"format {kind!r} needs an adapter, but all weights were trained: use 'full' or 'auto'"
        )
    if kind in ("merged", "delta") and any(not p.is_floating_point() for p in model.parameters()):
        raise ExportRequestError(
            "the base is quantised, and merging into it would round the update away: export the adapter, "
            "load the base in bfloat16 with the adapter on top, and merge that"
        )
    if adapter and len(_adapter_names(model)) != 1:
        raise ExportRequestError(
            f"needs one active adapter, found {_adapter_names(model)}: call set_adapter(NAME) first"
        )
    return kind


def _adapter_names(model: _Model) -> list[str]:
    active = model.active_adapters
    return list(active() if callable(active) else active)


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor":
            raise ExportError(f"{name} is sharded over ranks: save a full checkpoint first and export that")
        if parameter.device.type == "meta":
            raise ExportError(f"{name} has no data (it is on the meta device): load the weights first")


def _refuse_used_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ExportRequestError(f"{target} is a file: give a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / MARKER).is_file() and not overwrite:
        raise ExportRequestError(
            f"{target} holds files that are not an export of ours: give another folder, or overwrite=True "
            f"to move them to {target.name}.old"
        )
    if target.is_dir() and not _is_ours(target) and _aside(target).exists():
        raise ExportRequestError(
            f"{_aside(target)} is in the way of keeping what {target} holds: move it away first"
        )


def _is_ours(target: Path) -> bool:
    return (target / MARKER).is_file() or not any(target.iterdir())


def _aside(target: Path) -> Path:
    """Where a replaced target goes: out of sight for a moment if it is ours, else kept."""
    return target.with_name(f".{target.name}.replaced" if _is_ours(target) else f"{target.name}.old")


def _base_address(model: _Model, base_path: str | None) -> str | None:
    """Return the Hub id or absolute folder of the base, or None when it lives in memory only."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    address = base_path or getattr(core.config, "_name_or_path", None)
    if not address or address.startswith("embedded:"):
        return None
    folder = Path(address).expanduser()
    return str(folder.absolute()) if folder.is_dir() else address


def _needs_bundle(base: str | None, target: Path) -> bool:
    if base is None:
        return True
    # a base inside the target (an earlier export's) is about to be replaced; one that the same run made (its
    # warm start) is known to nobody else
    run = RunDirectory(target.parent)
    return Path(base).is_relative_to(target) or (run.config.is_file() and Path(base).is_relative_to(run.root))


def is_scorer(model: _Model) -> bool:
    """Return whether a model gives one number for a text: a reward model."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(core).__name__.endswith("ForSequenceClassification")


def _dtype(model: _Model) -> torch.dtype:
    """Return the type of the base weights; adapters are kept in fp32 over a bf16 base."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return next(core.get_input_embeddings().parameters()).dtype  # type: ignore[operator]


# ---- writing ----------------------------------------------------------------------------------------------


def _commit(model: _Model) -> str | None:
    """Return the exact commit of weights from the Hub, which transformers notes while loading."""
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(core.config, "_commit_hash", None)


def _record_revision(folder: Path, commit: str | None) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config["revision"] = commit
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_adapter(
    model: PeftModel, folder: Path, recorded_base: str | None, commit: str | None, *, bundled: bool
) -> None:
    (name,) = _adapter_names(model)
    # the vocabulary was not resized, so PEFT need not look at (or ask the Hub about) the embeddings
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # PEFT puts other names into a folder of their own
        for path in (folder / name).iterdir():
            path.rename(folder / path.name)
        (folder / name).rmdir()
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config["base_model_name_or_path"] = recorded_base
    config["revision"] = commit
    if bundled and isinstance(config.get("init_lora_weights"), str):
        # the base goes along as PiSSA, OLoRA and their kin left it: on that the adapter is a plain one, and
        # loading must not change the base a second time
        config["init_lora_weights"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    # trainers switch the cache off for gradient checkpointing; whoever generates with the export wants it
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if config.get("use_cache") is False:
        path.write_text(json.dumps({**config, "use_cache": True}, indent=2, sort_keys=True) + "\n")


def _save_delta(
    model: _Model, folder: Path, base: str, revision: str | None, about: Any
) -> tuple[float, str | None]:
    """Write the weights that differ from the base's, and the trained model's configuration; return their
    share, and the commit of a base from the Hub. The whole model lies on the disk for a moment: the delta is
    what differs between files."""
    whole = folder / ".whole"
    _save_weights(_merged_copy(model) if isinstance(model, PeftModel) else model, whole)
    header = write_delta(base, whole, folder / DELTA_FILE, revision=revision, about=about)
    for path in files_beside(whole):
        path.rename(folder / path.name)
    _remove(whole)
    return header.density, header.revision


def _cpu_copy(model: _Model, dtype: torch.dtype | None = None) -> _Model:
    """Copy a model into CPU memory, tied weights still tied; the accelerator's memory is not used."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        twin = parameter.detach().to("cpu", dtype or parameter.dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copy.deepcopy(model, memo)


def _base_copy(model: PeftModel) -> PreTrainedModel:
    """Return the base without any adapter, as a copy."""
    twin = _cpu_copy(model)
    # unload() alone would keep the trained modules_to_save
    wrappers = [(name, m) for name, m in twin.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, wrapper in wrappers:
        twin.set_submodule(name, wrapper.original_module)
    return twin.unload()  # type: ignore[operator]


def _base_parameters(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the live weights of the base under the names they have without an adapter."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False)
        if "lora_" not in name and ".modules_to_save." not in name
    }


def _merged_copy(model: PeftModel) -> PreTrainedModel:
    """Return the adapter folded into a copy, computed in fp32 and rounded once to the types of the base.

    Raises:
        ExportError: No weight changed by it, or the result is not finite.
    """
    twin = _cpu_copy(model, torch.float32)
    try:
        merged = twin.merge_and_unload(safe_merge=True, adapter_names=_adapter_names(model))  # type: ignore[operator]
    except ValueError as error:
        raise ExportError(f"the adapter cannot be merged: {error}") from error
    base, changed = _base_parameters(model), False
    for name, weight in merged.named_parameters():
        original = base.get(name)
        weight.data = weight.data.to(_dtype(model) if original is None else original.dtype)
        changed |= original is None or not torch.equal(weight.data, original.data.cpu())
    merged.config.dtype = _dtype(model)
    if not changed:
        trained = any(
            w.any() for name, w in model.named_parameters() if "lora_B" in name or "embedding_B" in name
        )
        reason = "every B matrix of the adapter is zero: it was not trained"
        if trained:
            reason = f"the update is below the resolution of {_dtype(model)}: export the adapter instead"
        raise ExportError(f"the merge changes no weight; {reason}")
    return merged


def _write_marker(folder: Path, result: ExportResult) -> None:
    content = {
        "posttrain": posttrain.__version__,
        **{key: value for key, value in asdict(result).items() if key != "folder"},
        "files": file_fingerprints(folder, leave_out=UNHASHED),
    }
    (folder / MARKER).write_text(json.dumps(content, indent=1) + "\n")


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename the finished folder; an earlier export is removed only afterwards."""
    if not target.exists():
        partial.rename(target)
        return
    ours, aside = _is_ours(target), _aside(target)
    if ours:
        _remove(aside)
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    if ours:
        _remove(aside)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ---- reading back -----------------------------------------------------------------------------------------


def _load_plain(folder: Path, base: str | None, live: _Model) -> _Model:
    """Load as any user would: transformers, and PEFT on top of ``base`` for an adapter; a delta by itself."""
    core = live.get_base_model() if isinstance(live, PeftModel) else live
    # remote code that already ran in training may run again
    remote = type(core).__module__.startswith("transformers_modules")
    if (folder / DELTA_FILE).is_file():
        return load_delta(folder, dtype=_dtype(live), trust_remote_code=remote)
    options: dict[str, Any] = {"dtype": _dtype(live), "use_safetensors": True, "trust_remote_code": remote}
    kind: Any = AutoModelForCausalLM
    if is_scorer(live):
        kind = AutoModelForSequenceClassification
        options["num_labels"] = 1
    if base is None:
        return kind.from_pretrained(folder, **options)
    revision = json.loads((folder / ADAPTER_CONFIG).read_text()).get("revision")
    with no_report() if is_scorer(live) else contextlib.nullcontext():  # the adapter has the head
        model = kind.from_pretrained(base, revision=revision, **options)
    return PeftModel.from_pretrained(model, str(folder))


def _reload_and_compare(
    folder: Path,
    base: str | None,
    live: _Model,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[torch.Tensor],
    trained: Sequence[torch.Tensor],
    base_logits: Sequence[torch.Tensor] | None,
) -> tuple[Comparison, str | None]:
    """Compare, and return also the commit of an adapter's base that came from the Hub."""
    try:
        reloaded = _load_plain(folder, base, live)
        with contextlib.suppress(torch.OutOfMemoryError):  # then the CPU will do
            reloaded.to(next(live.parameters()).device)  # type: ignore[arg-type]
        comparison = compare(trained, logits(reloaded, probes), base_logits, _dtype(live))
        text = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"the export does not load again: {error}{_base_hint(base)}") from error
    if comparison.problem is not None:
        raise ExportError(
            f"the reloaded export is not the trained model: {comparison.problem}{_base_hint(base)}"
        )
    if text.get_vocab() != tokenizer.get_vocab() or text.chat_template != tokenizer.chat_template:
        raise ExportError(
            "the reloaded tokenizer has another vocabulary or chat template than the one in training"
        )
    return comparison, None if base is None else _commit(reloaded)


def _base_hint(base: str | None) -> str:
    if base is None:
        return ""
    return (
        f". The adapter was put on the base {base!r}: if that is not what it was trained on (a warm start "
        f"changed the weights), pass bundle_base=True"
    )
