"""Reward models: one number per text, from a linear head on the last token of a decoder.

A causal checkpoint gets a fresh head, drawn from its own seed; a trained reward model is loaded as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from posttrain.config.schema import ModelConfig
from posttrain.models import load
from posttrain.models.load import ADAPTER_CONFIG, ModelLoadError
from posttrain.stored import stored_json

HEADS = ("score", "classifier")
"""Names that transformers gives the head."""


def load_reward_model(
    config: ModelConfig, *, seed: int = 0
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load the model that a reward run starts from, on the CPU, in evaluation mode.

    Args:
        config: The ``model`` section.
        seed: Seed of a head that is new, and of the weights of an embedded model.

    Returns:
        A model for sequence classification with one label, and its tokenizer.

    Raises:
        ModelLoadError: As :func:`posttrain.models.load.load_model`; also a classifier with several labels,
            and an architecture without one.
    """
    if load.is_untrained(config):
        causal, tokenizer = load.load_model(config, seed=seed)
        known = {key: value for key, value in causal.config.to_dict().items() if "label" not in key}
        settings = LlamaConfig(**{**known, "num_labels": 1})
        with _head_seed(seed):
            model = LlamaForSequenceClassification(settings)
        model.model.load_state_dict(causal.model.state_dict())
        for parameter in model.parameters():
            parameter.data = parameter.data.to(causal.dtype)
        return model.eval(), tokenizer
    if config.adapter is not None and load.find_adapter_folder(config.path, config.revision) is not None:
        raise ModelLoadError(
            f"model.path {config.path!r} is an adapter and model.adapter asks for another one on top: merge "
            "the first (posttrain export, format: merged) or drop the 'adapter' section to train it further"
        )
    return _load(config, trainable=True, seed=seed)


def load_scorer(
    path: str | Path, dtype: Any = "auto", *, base: str | Path | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a trained reward model (full, adapter, or a trainer's ``checkpoint-N``) for scoring.

    Returns:
        The model in evaluation mode without gradients, and its tokenizer.

    Raises:
        ModelLoadError: It is no trained reward model, or cannot be loaded.
    """
    config = ModelConfig(path=str(path), dtype=dtype, trust_remote_code=trust_remote_code)
    if load.is_untrained(config):
        raise ModelLoadError(
            f"{str(path)!r} is not trained, so its scores mean nothing: name a trained reward model"
        )
    model, tokenizer = _load(config, trainable=False, base=None if base is None else str(base))
    return model.eval().requires_grad_(False), tokenizer


def _load(
    config: ModelConfig, *, trainable: bool, base: str | None = None, seed: int | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a checkpoint or an adapter; a head may be new where there is a seed for it, or in the adapter."""
    adapter = load.find_adapter_folder(config.path, config.revision)
    if adapter is None:
        load._refuse_unusable_folder(config.path)
        model: Any = _from_pretrained(config, seed)
        tokenizer = load._load_tokenizer(config, [config.path])
    else:
        base_path = base or load._base_of(adapter)
        settings = stored_json(adapter / ADAPTER_CONFIG)
        if settings.get("task_type") not in (None, "SEQ_CLS"):
            fix = (
                "merge it into its base (posttrain export RUN --format merged) and start from that"
                if trainable
                else "train one with task: reward"
            )
            raise ModelLoadError(
                f"{config.path!r} is no reward model but an adapter of task type {settings['task_type']}: "
                + fix
            )
        # a head that is new is replaced by that of the adapter
        known = config.model_copy(update={"path": base_path, "revision": settings.get("revision")})
        model = _from_pretrained(known, 0 if _has_head(adapter) else None)
        tokenizer = load._load_tokenizer(config, [str(adapter), base_path])
        model = load._attach(model, adapter, base_path, trainable=trainable)
    load._align(model, tokenizer, config.path)
    return model.eval(), tokenizer


def _has_head(adapter: Path) -> bool:
    """Whether the adapter was trained with a head of its own."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as stored:
        return any(head in name.split(".") for name in stored.keys() for head in HEADS)  # noqa: SIM118


def _from_pretrained(config: ModelConfig, seed: int | None) -> PreTrainedModel:
    path = config.path
    if path.startswith("embedded:"):
        raise ModelLoadError(
            f"the adapter names {path!r} as its base, whose weights live only in the run that trained it: "
            "load the run's export"
        )
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    try:
        settings = AutoConfig.from_pretrained(path, **options)
        trained = any(name.endswith("ForSequenceClassification") for name in settings.architectures or ())
        if trained and settings.num_labels != 1:
            raise ModelLoadError(
                f"{path!r} is a classifier with {settings.num_labels} labels; a reward model has one"
            )
        settings.num_labels = 1
        with _head_seed(seed or 0), no_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                config=settings,
                dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **{key: value for key, value in options.items() if key != "attn_implementation"},
            )
    except (OSError, ImportError, KeyError, SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(load._explain(error, path, "reward model")) from error
    missing = sorted(info["missing_keys"])
    others = [name for name in missing if name.partition(".")[0] not in HEADS]
    if others:
        raise ModelLoadError(
            f"{path!r} lacks {len(others)} weights of a {type(model).__name__}, for example {others[0]}: "
            "the save was incomplete, or config.json belongs to another model"
        )
    if missing and seed is None:
        raise ModelLoadError(
            f"{path!r} is no reward model: it has no trained head ({', '.join(missing)}). Train one with "
            "task: reward"
        )
    return model


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """Keep transformers from reporting a head that is missing, where that is looked at or made good."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextlib.contextmanager
def _head_seed(seed: int) -> Iterator[None]:
    """Let a head that is drawn inside depend on the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
