"""The model card: what was trained, on what, by which methods, how well, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from posttrain.config import method_pages
from posttrain.models.load import BUNDLED_BASE
from posttrain.run.directory import RunDirectory
from posttrain.run.manifest import redact
from posttrain.stored import stored_config, stored_json

if TYPE_CHECKING:
    from posttrain.export.export import ExportResult

HERE = 'folder = "."  # where this file is'
"""The line of the loading code that a push replaces by a download."""

_BESIDE = f'f"{{folder}}/{BUNDLED_BASE}"'
_BUNDLED = (
    f"The base model had no address of its own, so it lies in `{BUNDLED_BASE}/`, and this folder can be "
    f"moved as a whole. (`AutoPeftModel` classes look for the base where it lay at export; the code below "
    f"does not.)"
)
_NO_LICENSE = "The base states no licence that was found; its terms hold for what was made of it, too."

# Read by people who have neither posttrain nor its documentation: the format is that of
# posttrain.selection.delta_file, and the hash that of posttrain.selection.plan.tensor_hash.
_PUT_ON = '''
with safe_open(f"{folder}/delta.safetensors", framework="pt") as file:
    delta = json.loads(file.metadata()["delta"])
    stored = {name: file.get_tensor(name) for name in file.keys()}


def positions(name, about, elements):
    """Where a tensor changed: all elements, a list, a bitmap, or distances in base 128."""
    kind = about["positions"]
    if kind == "all":
        return torch.arange(elements)
    packed = stored[f"{name}.{kind}"]
    if kind == "idx":
        return packed.long()
    packed = packed.numpy()
    if kind == "map":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(packed, bitorder="little")[:elements]))
    ends = np.flatnonzero(packed < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digit = np.arange(len(packed)) - np.repeat(starts, ends - starts + 1)
    gaps = np.add.reduceat((packed & 127).astype(np.int64) << (7 * digit), starts)
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)


base = Path(BASE)
index = base / "model.safetensors.index.json"
shards = {"model.safetensors"}
if index.is_file():
    shards = set(json.loads(index.read_text())["weight_map"].values())
model_folder = Path("MODEL_FOLDER")
model_folder.mkdir(exist_ok=True)
types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
for shard in shards:
    weights = load_file(base / shard)
    for key, weight in weights.items():
        name = delta["tied"].get(key, key)
        about = delta["tensors"].get(name)
        kind = about["dtype"] if about else delta["cast"].get(name)
        weight = weight.to(types.get(kind, weight.dtype)).contiguous()
        if about:
            flat = weight.flatten()
            flat[positions(name, about, flat.numel())] = stored[f"{name}.val"]
            weight = flat.view(weight.shape)
            told = hashlib.sha256(f"{str(weight.dtype)[6:]} {list(weight.shape)}\\n".encode())
            told.update(weight.view(-1).view(torch.uint8).numpy().data)
            assert told.hexdigest() == about["after"], f"{name}: this is not the base of the delta"
        weights[key] = weight
    save_file(weights, model_folder / shard, metadata={"format": "pt"})
for source in (base, Path(folder)):  # configuration and tokenizer; those of the trained model come last
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".model", ".jinja", ".py"}:
            shutil.copyfile(file, model_folder / file.name)

tokenizer = AutoTokenizer.from_pretrained(model_folder)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")'''


class CardData(TypedDict, total=False):
    """What a card can tell; everything is optional.

    Attributes:
        title: Heading; the folder's name when absent.
        task: A key of :data:`posttrain.config.tasks.TASKS`.
        base_model: What training started from, as the configuration names it.
        base_revision: Commit or branch of it that the configuration names.
        license: SPDX id; that of a local base's card when absent.
        methods: Parameters of each method, by name.
        selection: Which weights trained: the section of the configuration.
        data: ``source`` and what else describes the data (fingerprint, rows).
        evaluation: ``before``, ``after`` and ``difference``, each with ``metrics``: name to value, low, high.
        config: The resolved configuration, YAML.
        manifest: See :func:`posttrain.run.manifest.build_manifest`.
    """

    title: str
    task: str
    base_model: str
    base_revision: str | None
    license: str
    methods: Mapping[str, Mapping[str, Any]]
    selection: Mapping[str, Any]
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    config: str
    manifest: Mapping[str, Any]


def card_of(run: RunDirectory) -> CardData:
    """Collect what a run directory knows; files that are not there (yet) are left out."""
    card: CardData = {}
    if run.config.is_file():
        config = redact(stored_config(run.config))  # the card is made to be published
        card["config"] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        card["task"] = config["task"]
        model = config.get("model") or {}
        card["base_model"], card["base_revision"] = model.get("path", ""), model.get("revision")
        card["methods"] = config.get("methods") or {}
        card["selection"] = config.get("selection") or {}
        card["data"] = {"source": config["data"]["source"]}
    if run.manifest.is_file():
        card["manifest"] = stored_json(run.manifest)
        card["data"] = {**card.get("data", {}), **(card["manifest"].get("data") or {})}
    if run.evaluation.is_file():
        card["evaluation"] = stored_json(run.evaluation)
    return card


def write_card(folder: Path, card: CardData, result: ExportResult, *, prompt: str | None = None) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        folder: Where the export is being written.
        card: What to tell.
        result: The verified export.
        prompt: Example prompt of the loading code.
    """
    metadata = _metadata(card, result)
    title = card.get("title") or Path(result.folder).name
    code = loading_code(result, prompt, scores=card.get("task") == "reward")
    sections = [
        f"# {title}\n\n{_summary(card, result)}",
        _methods(_named(card)),
        _data(card.get("data") or {}),
        _metrics(card.get("evaluation") or {}),
        f"## How to load\n\n{_loading_text(result)}\n\n```python\n{code}\n```{_loading_more(result)}",
        _license_text(metadata, card, result),
        _repeat(card),
    ]
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n").save(folder / "README.md")


def loading_code(result: ExportResult, prompt: str | None = None, *, scores: bool = False) -> str:
    """Return Python that loads the export, with transformers and PEFT alone, and generates from ``prompt``,
    or scores it with a reward model. A delta is put on its base by that code, which needs nothing of ours."""
    short = prompt if prompt and len(prompt) <= 200 else "Once upon a time"
    if result.format == "delta":
        return _delta_code(result, short)
    if result.format == "adapter":
        pin = f", revision={json.dumps(result.base_revision)}" if result.base_revision else ""
        base = _BESIDE if result.base_bundled else json.dumps(result.base) + pin
        imports = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
        load = f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        load += "model = PeftModel.from_pretrained(base, folder)"
    else:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        load = "model = AutoModelForCausalLM.from_pretrained(folder)"
    if scores:
        kind = "AutoModelForSequenceClassification"
        imports = imports.replace("AutoModelForCausalLM", kind)
        load = load.replace("AutoModelForCausalLM", kind).replace(")\nmodel", ", num_labels=1)\nmodel")
        return f"""{imports}

{HERE}
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
text = {json.dumps(short, ensure_ascii=False)} + " An answer." + tokenizer.eos_token
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
print(model(**inputs).logits.item())"""
    return f"""{imports}

{HERE}
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
inputs = tokenizer({json.dumps(short, ensure_ascii=False)}, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def _delta_code(result: ExportResult, prompt: str) -> str:
    base = json.dumps(result.base)
    download = ""
    if is_hub_id(result.base):
        pin = f", revision={json.dumps(result.base_revision)}" if result.base_revision else ""
        base, download = f"snapshot_download({base}{pin})", "from huggingface_hub import snapshot_download\n"
    put_on = _PUT_ON.replace("Path(BASE)", f"Path({base})").replace("MODEL_FOLDER", "trained-model")
    return f"""import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
{download}from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

{HERE}
{put_on.strip()}
inputs = tokenizer({json.dumps(prompt, ensure_ascii=False)}, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def for_hub(
    text: str, repo_id: str, revision: str | None = None, *, base: tuple[str, str | None] | None = None
) -> str:
    """Return the card's text with loading code that downloads ``repo_id`` first.

    Args:
        text: The card in the folder.
        repo_id: Where it goes.
        revision: Branch there.
        base: Repository and commit that the bundled base goes to.
    """
    pin = f", revision={json.dumps(revision)}" if revision else ""
    download = f"folder = snapshot_download({json.dumps(repo_id)}{pin})"
    if "from huggingface_hub import snapshot_download" not in text:
        download = f"from huggingface_hub import snapshot_download\n\n{download}"
    text = text.replace(HERE, download)
    home = str(Path.home())
    text = (
        text.replace(f"{home}/", "~/") if len(home) > 1 else text
    )  # whose machine it was is nobody's business
    if base is None:
        return text
    at = f", revision={json.dumps(base[1])}" if base[1] else ""
    text = text.replace(_BESIDE, json.dumps(base[0]) + at).replace(_BUNDLED, _adapter_text(base[0]))
    card: Any = ModelCard(text, ignore_metadata_errors=True)
    card.data.base_model, card.data.base_model_relation = base[0], "adapter"
    return str(card)


def base_card(repo_id: str, adapter: str, license: Mapping[str, Any]) -> str:
    """Return the card of a repository that holds the base of an adapter."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["posttrain"], **license
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\nThe weights that the adapter "
        f"[{adapter}](../{adapter.rpartition('/')[2]}) was trained on, published with it because they have "
        f"no other address. `AutoModelForCausalLM.from_pretrained({json.dumps(repo_id)})` loads them.\n"
    )


def license_of_card(data: Any) -> dict[str, str]:
    """Return ``license``, and ``license_name`` and ``license_link`` of one that is none of the usual, as far
    as the front matter of a card has them."""
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in found.items() if value}


def with_license(text: str, license: Mapping[str, str]) -> str:
    """Return a card that says the licence of its base, unless it does already."""
    card: Any = ModelCard(text, ignore_metadata_errors=True)
    if card.data.license or "license" not in license:
        return text
    for name, value in license.items():
        setattr(card.data, name, value)
    return str(card).replace(_NO_LICENSE, f"`{license['license']}`, that of the base.")


def is_hub_id(address: str | None) -> bool:
    """Return whether an address names a repository of the Hub rather than a folder or an embedded model."""
    if not address or ":" in address or Path(address).expanduser().exists():
        return False
    try:
        validate_repo_id(address)
    except HFValidationError:
        return False
    return True


def _metadata(card: CardData, result: ExportResult) -> ModelCardData:
    bases = [address for address in (result.base, card.get("base_model")) if is_hub_id(address)]
    source = str((card.get("data") or {}).get("source", ""))
    stated = {"license": card["license"]} if card.get("license") else {}
    license: Mapping[str, Any] = stated or _license_of(result.base or card.get("base_model"))
    relation = "adapter" if result.format == "adapter" else "finetune"
    return ModelCardData(
        base_model=bases[0] if bases else None,
        base_model_relation=relation if bases else None,
        library_name={"adapter": "peft", "delta": "posttrain"}.get(result.format, "transformers"),
        **license,
        pipeline_tag="text-classification" if card.get("task") == "reward" else "text-generation",
        datasets=[source] if is_hub_id(source) else None,
        tags=["trl", "posttrain", *([card["task"]] if "task" in card else []), *_named(card)],
    )


def _license_of(base: str | None) -> dict[str, str]:
    """Read the licence from the card of a base on this machine, in a folder or the cache of the Hub; nothing
    is looked up on the Hub."""
    if not base:
        return {}
    cached = try_to_load_from_cache(base, "README.md") if is_hub_id(base) else None
    readme = Path(cached) if isinstance(cached, str) else Path(base) / "README.md"
    if not readme.is_file():
        return {}
    return license_of_card(ModelCard.load(readme, ignore_metadata_errors=True).data)


def _license_text(metadata: ModelCardData, card: CardData, result: ExportResult) -> str:
    if not (result.base or card.get("base_model")) or (card.get("base_model") or "").startswith("embedded:"):
        return ""  # it started from random weights
    known = metadata.license
    return f"## Licence\n\n`{known}`, that of the base." if known else f"## Licence\n\n{_NO_LICENSE}"


def _summary(card: CardData, result: ExportResult) -> str:
    what = {
        "adapter": "A PEFT adapter",
        "merged": "Weights with the trained adapter merged in",
        "full": "A fully trained model",
        "delta": f"A sparse delta: the {result.density or 0:.2%} of the weights that training changed",
    }[result.format]
    start = f" Training started from `{card['base_model']}`" if card.get("base_model") else ""
    start += f" at revision `{_revision(card, result)}`" if start and _revision(card, result) else ""
    start += "." if start else ""
    kind = {
        "sft": " by supervised fine-tuning",
        "rlvr": " by reinforcement learning from verifiable rewards",
        "ttrl": " by reinforcement learning from majority votes, without labels",
        "preference": " by preference optimisation",
        "reward": " as a reward model, on preferences",
    }
    check = result.comparison
    return (
        f"{what} ({result.dtype}), trained with posttrain{kind.get(card.get('task', ''), '')}.{start}\n\n"
        f"Reloaded from disk and compared with the trained model on {check.positions} probe tokens: the "
        f"logits differ by at most {check.max_difference:.2g} (allowed: {check.tolerance:.2g})."
    )


def _revision(card: CardData, result: ExportResult) -> str | None:
    """Return the commit of the base, else what the configuration asked for."""
    return result.base_revision or card.get("base_revision")


def _named(card: CardData) -> dict[str, Mapping[str, Any]]:
    """Return the parameters of the methods, and of the selector that chose what trains."""
    named = dict(card.get("methods") or {})
    selection = card.get("selection") or {}
    if selection.get("method"):
        named[selection["method"]] = selection.get("params") or {}
    return named


def _methods(methods: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, params in methods.items():
        method = method_pages.resolve(name)
        paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
        settings = ", ".join(f"{key}={value!r}" for key, value in (params or {}).items())
        lines.append(f"- **{method.title}**{paper}: `{name}({settings})`")
    return "## Methods\n\n" + "\n".join(lines) if lines else ""


def _data(data: Mapping[str, Any]) -> str:
    lines = [f"- {key.replace('_', ' ')}: `{value}`" for key, value in data.items() if value is not None]
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _metrics(evaluation: Mapping[str, Any]) -> str:
    columns = {
        name: evaluation[name].get("metrics", evaluation[name])
        for name in ("before", "after", "difference")
        if evaluation.get(name)
    }
    if not columns:
        return ""
    names = list(dict.fromkeys(metric for metrics in columns.values() for metric in metrics))
    lines = [f"| metric | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(_cell(m.get(name)) for m in columns.values()) + " |" for name in names
    ]
    note = "Held-out problems; in brackets the bootstrap interval over problems."
    return f"## Evaluation\n\n{note}\n\n" + "\n".join(lines)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate.get("value") is None:
        return ""
    low, high = estimate.get("low"), estimate.get("high")
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{estimate['value']:.3f}{interval}"


def _loading_text(result: ExportResult) -> str:
    if result.format == "delta":
        return (
            f"The weights belong on the base `{result.base}` and give the trained model to the bit; another "
            "base is refused. The base's licence covers the result. This writes the trained model to a "
            "folder that plain `transformers` loads from then on:"
        )
    if result.format != "adapter":
        return "Plain `transformers` is enough."
    return _BUNDLED if result.base_bundled else _adapter_text(str(result.base))


def _adapter_text(base: str) -> str:
    return f"Plain `peft` and `transformers` are enough. The adapter belongs to the base `{base}`."


def _loading_more(result: ExportResult) -> str:
    if result.format != "delta":
        return ""
    return (
        "\n\nWith posttrain at hand, `posttrain delta apply FOLDER --to NEW` does the same, and "
        "`posttrain.load_delta(folder)` without writing anything."
    )


def _repeat(card: CardData) -> str:
    manifest = dict(card.get("manifest") or {})
    parts = []
    if manifest.get("command"):
        parts.append(f"## Repeat it\n\n```bash\n{manifest['command']}\n```")
    if card.get("config"):
        parts.append(f"## Configuration\n\n```yaml\n{card['config'].strip()}\n```")
    if manifest:
        manifest.pop("config", None)  # shown above
        parts.append(f"## Manifest\n\n```json\n{json.dumps(manifest, indent=1, ensure_ascii=False)}\n```")
    return "\n\n".join(parts)
