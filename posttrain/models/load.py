"""Loading models and tokenizers: the embedded one, checkpoints of the Hub or of a folder, PEFT adapters.

Only safetensors are read (a pickle can run code when it is opened), code shipped with a checkpoint runs only
where the configuration says so, and the vocabulary never grows behind the user's back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from posttrain.config.schema import ModelConfig
from posttrain.models import embedded
from posttrain.models.adapter import build_peft_config as build_peft_config
from posttrain.stored import stored_json

ADAPTER_CONFIG = "adapter_config.json"
DELTA_FILE = "delta.safetensors"
"""Name of a sparse delta in an exported folder."""

BUNDLED_BASE = "base"
"""Folder beside an exported adapter that holds its base model, when that has no address of its own."""

_EMBEDDED_PREFIX = "embedded:"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# in order of preference; ids of tokens that pad a text in some family and mean nothing inside one
_PAD_CANDIDATES = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<unk>",
)


class ModelLoadError(ValueError):
    """A model or tokenizer that cannot be loaded; the message says what was found and how to fix it."""


def is_untrained(config: ModelConfig) -> bool:
    """Return whether the model starts from random weights: true for embedded models only."""
    return config.path.startswith(_EMBEDDED_PREFIX)


def load_model(
    config: ModelConfig, *, seed: int = 0
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that a configuration names, on the CPU.

    The tokenizer has a pad and an end-of-text token, pads to the left, and its pad token is also that of the
    model's configuration and generation settings. ``dtype: auto`` keeps the type of the checkpoint (fp32 for
    the embedded model). The ``adapter`` section is not applied here: see :func:`build_peft_config`.

    Args:
        config: The ``model`` section.
        seed: Seed of the weights of an embedded model; unused for checkpoints.

    Returns:
        The model in evaluation mode, and its tokenizer. For an adapter folder or repository, a ``PeftModel``
        over its base whose adapter is trainable, so that a run can go on with it.

    Raises:
        ModelLoadError: The path is neither a folder nor reachable on the Hub, weights are pickles, there is
            no tokenizer, the tokenizer does not fit the vocabulary, or the architecture is unknown.
    """
    if is_untrained(config):
        return _load_embedded(config, seed)
    if config.adapter is not None and find_adapter_folder(config.path, config.revision) is not None:
        raise ModelLoadError(
            f"model.path {config.path!r} is an adapter and model.adapter asks for another one on top: "
            f"merge the first (posttrain export, format: merged) or drop the 'adapter' section to train "
            f"it further"
        )
    return _load_checkpoint(config, trainable=True)


def load_for_evaluation(
    path: str | Path,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a finished model for generation: a checkpoint, an adapter, or a trainer's ``checkpoint-N``.

    Args:
        path: Folder or Hub id.
        dtype: Type of the weights; ``auto`` keeps that of the checkpoint.
        base: Base model of an adapter, where the recorded one has moved.
        trust_remote_code: Run Python shipped with the checkpoint.

    Returns:
        The model in evaluation mode without gradients, and its tokenizer.

    Raises:
        ModelLoadError: As :func:`load_model`; also an adapter whose base is missing.
    """
    config = ModelConfig(path=str(path), dtype=dtype, trust_remote_code=trust_remote_code)
    if is_untrained(config):
        model, tokenizer = load_model(config)
    else:
        model, tokenizer = _load_checkpoint(config, trainable=False, base=None if base is None else str(base))
    return model.eval().requires_grad_(False), tokenizer


def find_adapter_folder(path: str, revision: str | None = None) -> Path | None:
    """Return the local folder of the PEFT adapter at ``path`` (downloaded from the Hub if need be), or "
    "None."""
    if Path(path).is_dir():
        return Path(path) if (Path(path) / ADAPTER_CONFIG).is_file() else None
    _refuse_missing_folder(path)
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise ModelLoadError(f"{path[:200]!r} is neither a folder nor a Hub id such as user/name") from None
    if find_adapter_config_file(path, revision=revision) is None:
        return None
    return download(path, revision)


def download(path: str, revision: str | None = None, *, only: Sequence[str] | None = None) -> Path:
    """Return the local folder of a Hub repository, without pickles; from the cache while the Hub is off.

    Args:
        path: Hub id.
        revision: Commit, tag or branch.
        only: Patterns of the files needed; all when None.
    """
    folder = snapshot_download(
        path,
        revision=revision,
        allow_patterns=None if only is None else list(only),
        ignore_patterns=list(_PICKLES),
        # left to itself it asks the Hub which files a commit has, however much of it is in the cache
        local_files_only=hub_constants.HF_HUB_OFFLINE,
    )
    return Path(folder)


def _load_embedded(config: ModelConfig, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.path != embedded.NAME:
        raise ModelLoadError(
            f"model.path: unknown embedded model {config.path!r}; the only one is {embedded.NAME!r}"
        )
    for field in ("tokenizer", "revision"):
        if getattr(config, field) is not None:
            raise ModelLoadError(
                f"model.{field} does not go with {embedded.NAME!r}, which brings its own: drop it"
            )
    try:
        model = embedded.build_model(seed, attn_implementation=config.attn_implementation)
    except (ValueError, ImportError) as error:  # the only thing in the configuration that can fail here
        raise ModelLoadError(f"model.attn_implementation: {error}") from error
    if config.dtype != "auto":
        # not model.to(): a checkpoint loaded in bf16 keeps its rotary frequencies in fp32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
        model.config.dtype = getattr(torch, config.dtype)
    return model, embedded.build_tokenizer()


def _load_checkpoint(
    config: ModelConfig, *, trainable: bool, base: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    adapter_folder = find_adapter_folder(config.path, config.revision)
    if adapter_folder is None:
        _refuse_unusable_folder(config.path)
        model: PreTrainedModel | PeftModel = _from_pretrained(config)
        tokenizer = _load_tokenizer(config, [config.path])
    else:
        base_path = base or _base_of(adapter_folder)
        # the revision belongs to the adapter's own repository, not to the base
        base_revision = stored_json(adapter_folder / ADAPTER_CONFIG).get("revision")
        model = _from_pretrained(config.model_copy(update={"path": base_path, "revision": base_revision}))
        tokenizer = _load_tokenizer(config, [str(adapter_folder), base_path])
        model = _attach(model, adapter_folder, base_path, trainable=trainable)
    _align(model, tokenizer, config.path)
    return model.eval(), tokenizer


def _refuse_missing_folder(path: str) -> None:
    """Tell a mistyped folder from a Hub id, which has at most one slash and starts with a letter or digit."""
    looks_local = (
        path.startswith((".", "/", "~")) or "\\" in path or path.endswith("/") or path.count("/") > 1
    )
    if looks_local:
        raise ModelLoadError(
            f"no such folder: {path!r} (looked in {Path(path).expanduser().absolute()}). Give the folder "
            f"of a checkpoint, or a Hub id of the form 'user/name'"
        )


def _refuse_unusable_folder(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        inner = sorted(
            p.parent.name for p in folder.glob("*/*config.json") if p.name in ("config.json", ADAPTER_CONFIG)
        )
        hint = (
            f" Its folders {inner} do: give one of them."
            if inner
            else f" It holds {sorted(_listing(folder))}."
        )
        raise ModelLoadError(
            f"{path!r} is not a checkpoint: it has neither config.json nor {ADAPTER_CONFIG}.{hint}"
        )
    refuse_delta(folder)
    _refuse_pickles(folder, needed="model.safetensors")


def refuse_delta(folder: Path) -> None:
    """Refuse a folder that holds a delta instead of weights.

    Raises:
        ModelLoadError: It does.
    """
    if (folder / DELTA_FILE).is_file() and not any(folder.glob("model*.safetensors")):
        raise ModelLoadError(
            f"{str(folder)!r} holds a sparse delta, not a model: put it on its base with "
            f"posttrain delta apply {folder} --to FOLDER, or load it with posttrain.load_delta"
        )


def _listing(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir()]
    return [*names[:10], f"and {len(names) - 10} more"] if len(names) > 10 else names


def _refuse_pickles(folder: Path, *, needed: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(entry.name for pattern in _PICKLES for entry in folder.glob(pattern))
    if pickles:
        raise ModelLoadError(
            f"{str(folder)!r} holds pickled weights only ({', '.join(pickles)}), which can run code when "
            f"opened: convert them to {needed} with a copy of the model you trust (load it and call "
            f"save_pretrained)"
        )
    raise ModelLoadError(f"{str(folder)!r} holds no weights: {needed} is missing. Was the save interrupted?")


def _from_pretrained(config: ModelConfig) -> PreTrainedModel:
    path = config.path
    if path == embedded.NAME:
        raise ModelLoadError(
            f"the adapter names {embedded.NAME!r} as its base, whose weights live only in the run that "
            f"trained it: give the folder of the base model, or load the run's export"
        )
    options: dict[str, Any] = (
        {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelLoadError(_explain(error, path, "model")) from error
    model, info = loaded
    if info["missing_keys"]:
        # transformers fills them with random numbers and goes on
        names = sorted(info["missing_keys"])
        raise ModelLoadError(
            f"{path!r} lacks {len(names)} weights of a {type(model).__name__}, for example {names[0]}: "
            f"the save was incomplete, or config.json belongs to another model"
        )
    return model


def _explain(error: Exception, path: str, what: str) -> str:
    """Say what was tried and what to do about it; the library's own words come last."""
    words = " ".join(str(error).split())
    if "trust_remote_code" in words:
        fix = "It ships its own Python code: read it, then set model.trust_remote_code: true if you trust it"
    elif isinstance(error, SafetensorError):
        fix = "A weight file is damaged or cut short: copy or download it again"
    elif "safetensors" in words:
        fix = (
            "It has no safetensors weights, and pickled ones are not read: use another revision or convert it"
        )
    elif not Path(path).exists() and isinstance(error, OSError):
        state = (
            "the Hub is switched off (HF_HUB_OFFLINE=1)"
            if hub_constants.HF_HUB_OFFLINE
            else "see the Hub's answer"
        )
        fix = (
            f"There is no folder of that name in {Path.cwd()}, and as a Hub id it is not in the local "
            f"cache; {state}. Check the spelling, log in (hf auth login) if it is private or gated, or "
            f"download it first (hf download {path})"
        )
    else:
        fix = "Check model.path, model.revision and model.attn_implementation"
    return f"cannot load the {what} {path!r}. {fix}. [{type(error).__name__}: {words[:400]}]"


def _base_of(adapter_folder: Path) -> str:
    """Return where the base of an adapter is: the recorded path, or the copy bundled with the adapter."""
    _refuse_pickles(adapter_folder, needed="adapter_model.safetensors")
    recorded = stored_json(adapter_folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    bundled = adapter_folder / BUNDLED_BASE
    if bundled.is_dir():
        return str(bundled)
    if not recorded:
        raise ModelLoadError(
            f"the adapter {str(adapter_folder)!r} does not say which base it belongs to "
            f"(base_model_name_or_path is empty, as for a base built in memory): give the base's folder "
            f"as 'base', or load the run's export"
        )
    if Path(recorded).is_absolute() and not Path(recorded).is_dir():
        raise ModelLoadError(
            f"the adapter {str(adapter_folder)!r} belongs to the base {recorded!r}, which is not there: "
            f"put it back, or give its new place as 'base', or correct base_model_name_or_path in "
            f"{ADAPTER_CONFIG}"
        )
    return recorded


def _attach(model: PreTrainedModel, adapter_folder: Path, base_path: str, *, trainable: bool) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # PEFT only warns when the file lacks tensors, and the adapter would then be half random
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = PeftModel.from_pretrained(model, str(adapter_folder), is_trainable=trainable)
        # PEFT says nothing about tensors that found no place
        with safe_open(adapter_folder / "adapter_model.safetensors", framework="pt") as file:
            stored = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118, not a mapping
        spare = sorted(stored - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
        if spare:
            raise ValueError(f"{len(spare)} tensors have no place in it, for example {spare[0]}")
    except (ValueError, RuntimeError, UserWarning, SafetensorError) as error:
        raise ModelLoadError(
            f"the adapter {str(adapter_folder)!r} does not fit the base {base_path!r}: was it trained on "
            f"another model? [{type(error).__name__}: {' '.join(str(error).split())[:400]}]"
        ) from error
    return adapted


def _load_tokenizer(config: ModelConfig, places: list[str]) -> PreTrainedTokenizerBase:
    """Load from ``model.tokenizer`` if given, else from the first place that has one."""
    if config.tokenizer is not None:
        places = [config.tokenizer]
    errors = []
    for place in places:
        _refuse_missing_folder_unless_dir(place)
        # an adapter folder often holds none: transformers would then build an empty one from config.json
        if Path(place).is_dir() and not _has_tokenizer(Path(place)):
            errors.append(f"{place!r} has no tokenizer files (tokenizer.json, tokenizer_config.json)")
            continue
        revision = config.revision if place == config.path else None
        try:
            return AutoTokenizer.from_pretrained(
                place, revision=revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            errors.append(_explain(error, place, "tokenizer"))
    raise ModelLoadError(
        f"no tokenizer: {'; '.join(errors)}. Put the tokenizer beside the model or name its folder or Hub "
        f"id in model.tokenizer"
    )


def _refuse_missing_folder_unless_dir(path: str) -> None:
    if not Path(path).is_dir():
        _refuse_missing_folder(path)


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    )


def _align(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give tokenizer and model one pad token and one end-of-text token, and check that they fit."""
    rows = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    _refuse_vocabulary_mismatch(tokenizer, rows, path)
    generation = getattr(model, "generation_config", None)  # a reward model has none
    if tokenizer.eos_token is None:
        eos = generation.eos_token_id if generation is not None else None
        eos = eos[0] if isinstance(eos, list) else eos
        if eos is None:
            raise ModelLoadError(
                f"the tokenizer of {path!r} has no end-of-text token and generation_config.json names "
                f"none, so that generation would never stop: set eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        known = [token for token in _PAD_CANDIDATES if token in vocabulary and vocabulary[token] < rows]
        tokenizer.pad_token = known[0] if known else tokenizer.eos_token
        if not known:
            warnings.warn(
                f"the tokenizer of {path!r} has no pad token and no spare special token: padding with its "
                f"end-of-text token {tokenizer.eos_token!r}",
                stacklevel=4,
            )
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        if generation.eos_token_id is None:
            generation.eos_token_id = tokenizer.eos_token_id


def _refuse_vocabulary_mismatch(tokenizer: PreTrainedTokenizerBase, rows: int, path: str) -> None:
    outside = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if not outside:
        return
    # Gemma 3 text models ship a tokenizer with image tokens that have no row: harmless until one is used
    in_use = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = set(tokenizer.all_special_tokens) | {
        t.content for t in tokenizer.added_tokens_decoder.values() if t.special
    }
    ordinary = [token for _, token in outside if token not in special or token in in_use]
    found = (
        f"the tokenizer of {path!r} has {len(outside)} tokens with ids from {outside[0][0]} up to "
        f"{outside[-1][0]}, but the model has {rows} embedding rows"
    )
    if ordinary:
        raise ModelLoadError(
            f"{found} (for example {ordinary[0]!r}): it belongs to another model; set model.tokenizer"
        )
    warnings.warn(f"{found}; they are special tokens, so text cannot contain them by chance", stacklevel=5)
