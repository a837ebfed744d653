"""A model without weights: its shapes, on the meta device, and its real tokenizer.

What can be seen before anything is loaded is seen on it: parameter counts, which modules an adapter finds,
how tokenizer and vocabulary fit. Of a Hub repository only the configuration and the tokenizer are fetched.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.config.schema import ModelConfig
from posttrain.models import load
from posttrain.models.load import ADAPTER_CONFIG, ModelLoadError
from posttrain.stored import stored_json


def load_skeleton(
    config: ModelConfig, *, scores: bool = False
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Return what :func:`posttrain.models.load.load_model` would load, without weights.

    ``dtype: auto`` is the type that the checkpoint's configuration names, fp32 where it names none. The
    ``adapter`` section is not applied.

    Args:
        config: The ``model`` section.
        scores: Whether it is a reward model, with one number per text.

    Returns:
        The model on the meta device, and its tokenizer.

    Raises:
        ModelLoadError: As :func:`posttrain.models.load.load_model`, but for what only weights show.
    """
    if load.is_untrained(config):
        model: Any
        model, tokenizer = load.load_model(config)
        if scores:
            return _build(model.config, model.dtype, config, scores=True), tokenizer
        return model.to("meta"), tokenizer
    adapter = load.find_adapter_folder(config.path, config.revision)
    if adapter is None:
        load._refuse_unusable_folder(config.path)
        model = _checkpoint(config, scores)
        tokenizer = load._load_tokenizer(config, [config.path])
    else:
        if config.adapter is not None:
            raise ModelLoadError(
                f"model.path {config.path!r} is an adapter and model.adapter asks for another one on top: "
                "merge the first (posttrain export, format: merged) or drop the 'adapter' section"
            )
        base = load._base_of(adapter)
        settings = stored_json(adapter / ADAPTER_CONFIG)
        known = config.model_copy(update={"path": base, "revision": settings.get("revision")})
        model = _checkpoint(known, scores)
        tokenizer = load._load_tokenizer(config, [str(adapter), base])
    load._align(model, tokenizer, config.path)
    if adapter is not None:
        with torch.device("meta"):
            model = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    return model, tokenizer


def _checkpoint(config: ModelConfig, scores: bool) -> Any:
    try:
        settings = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        dtype = settings.dtype or torch.float32
        model = _build(
            settings, dtype if config.dtype == "auto" else getattr(torch, config.dtype), config, scores=scores
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelLoadError(load._explain(error, config.path, "model")) from error
    if not scores:
        with contextlib.suppress(OSError):  # where there is none, that of the configuration stays
            model.generation_config = GenerationConfig.from_pretrained(
                config.path, revision=config.revision or "main"
            )
    return model


def _build(settings: Any, dtype: torch.dtype, config: ModelConfig, *, scores: bool) -> PreTrainedModel:
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if scores:
        settings.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(settings, **options)
    return model
