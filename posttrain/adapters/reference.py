"""The initial policy of a run with an adapter: found by measuring, kept as a frozen copy named ``ref``.

TRL takes the model with its adapter off for the initial policy. That is wrong where a fresh adapter acts at
once (``init_lora_weights=False``, FourierFT, C3A, VB-LoRA, soft prompts) and where it moved weights out of
the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ: with the adapter off the residual is left). Then the log-ratio
of step 0 is not 0, DPO starts beside ln 2 and the KL term of GRPO beside 0. Here the two are compared on
a few tokens; where they differ the reference is the base with a frozen copy of the adapter.

TRL does copy the adapter of a ready ``PeftModel``, with the configuration it was made with: PiSSA and its kin
subtract from the base weights a second time, and parameters whose name ends in the adapter's are not copied.
:func:`copied_safely` and :func:`keep_initial` repair both.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel
from transformers import Trainer
from trl.trainer.utils import hash_module, use_adapter

from posttrain.sharding import before_training

logger = logging.getLogger(__name__)

REFERENCE = "ref"

#: Largest difference of log-probabilities, relative to their size, that is rounding.
_ROUNDING = 1e-5
#: Nats per token between policy and reference that are rounding, in float32 and below.
_GAP, _HALF_GAP = 1e-4, 0.05
# ``init_lora_weights`` that leave base and output as they are; for models that cannot be measured.
_EMPTY_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Starts whose change of the base is not the same again when a saved adapter is loaded.
_UNREPEATABLE = ("pissa_niter_", "corda", "lora_ga", "loftq")


class AdapterError(ValueError):
    """The adapter cannot be trained against its initial state, or not by this trainer."""


def adapter_pairs(policy: PeftModel, trained: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the parameters and buffers of the copy and of adapter ``trained``, in pairs."""
    tensors: dict[str, torch.Tensor] = dict(policy.named_parameters(remove_duplicate=False))
    tensors.update(policy.named_buffers(remove_duplicate=False))
    pairs = {}
    for name, tensor in tensors.items():
        # the name of the adapter is a key of a module, parameter or buffer dictionary: a part of its own
        twin = ".".join(REFERENCE if part == trained else part for part in name.split("."))
        if twin != name and twin in tensors:
            pairs[id(tensors[twin])] = (tensors[twin], tensor)
    return list(pairs.values())


def starts_empty(adapter: PeftConfig | None) -> bool:
    """Whether a new adapter is known to leave output and base as they are, by its configuration alone."""
    if adapter is None:
        return True
    init = getattr(adapter, "init_lora_weights", None)  # only the LoRA family has it
    return init is True or init in _EMPTY_STARTS


def hides_start(policy: PeftModel) -> bool:
    """Whether ``policy`` and ``policy`` with its adapter off differ by more than rounding.

    Measured by log-probabilities of a few tokens, with TRL's fused head in place. Where weights are not at
    hand (DeepSpeed ZeRO-3, ranks that load no weights under FSDP) the kind of adapter decides: everything
    that is not known to start empty counts as different, and a copy that was not needed does no harm.

    Raises:
        AdapterError: The policy has no forward that TRL's trainers can use.
    """
    config = policy.peft_config[policy.active_adapters[0]]
    if not _measurable(policy):
        return not starts_empty(config)
    live = _probe(policy)
    with policy.disable_adapter():
        base = _probe(policy)
    return _differ(live, base)


def keep_initial(policy: PeftModel) -> None:
    """Add or complete a frozen copy named ``ref`` of the active adapter, as it is now.

    Raises:
        AdapterError: PEFT cannot hold a second adapter of this kind, or the copy does not equal the policy.
    """
    trained = policy.active_adapters[0]
    config = policy.peft_config[trained]
    kind = _kind(config)
    measurable = _measurable(policy)
    before = _probe(policy) if measurable else None
    if REFERENCE not in policy.peft_config:
        trains = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
        devices = [policy.device] if policy.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # adding an adapter draws its initial values
                policy.add_adapter(REFERENCE, harmless(config))
        except Exception as error:
            raise AdapterError(
                f"the reference of a run is its initial policy, here the model with its {kind} adapter as it "
                f"starts; PEFT cannot keep a copy of that ({type(error).__name__}: {error}). Start from an "
                "adapter that changes nothing yet, or give ref_model."
            ) from error
        for name, parameter in policy.named_parameters():
            if name in trains:
                parameter.requires_grad_(trains[name])
    for copied, tensor in adapter_pairs(policy, trained):
        if copied.dtype == tensor.dtype and copied.shape == tensor.shape:
            copied.data.copy_(tensor.data)
        else:
            copied.data = tensor.data.clone()
        copied.requires_grad_(False)
    init = str(getattr(config, "init_lora_weights", None))
    if init.startswith(_UNREPEATABLE):
        logger.warning(
            "init_lora_weights=%r takes weights out of the base by a draw or by data that is not saved: an "
            "adapter saved from this run does not fit the base as published. Merge it before saving "
            "(merge_and_unload), or save with PEFT's path_initial_model_for_weight_conversion.",
            init,
        )
    if before is None:
        return
    after = _probe(policy)
    with use_adapter(policy, adapter_name=REFERENCE):
        reference = _probe(policy)
    if _differ(before, after) or _differ(reference, after):
        what = (
            "adding it changed the policy" if _differ(before, after) else "the copy differs from the policy"
        )
        raise AdapterError(
            f"the reference of a run is its initial policy; a copy of a {kind} adapter was made and {what}. "
            "Start from an adapter that changes nothing yet, or give ref_model."
        )


@contextlib.contextmanager
def copied_safely(model: Any) -> Iterator[None]:
    """Keep TRL's constructor, which copies the adapter of a ready ``PeftModel``, from changing the base."""
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        yield
        return
    trained = model.active_adapters[0]
    config = model.peft_config[trained]
    model.peft_config[trained] = harmless(config)
    try:
        yield
    finally:
        model.peft_config[trained] = config


def load_beside_reference(policy: Any, checkpoint: str) -> None:
    """Load the trained adapter of a checkpoint that also holds others, such as the reference.

    transformers loads the adapters of subfolders and then forgets the one beside them.
    """
    if isinstance(policy, PeftModel) and "default" in policy.peft_config and len(policy.peft_config) > 1:
        policy.load_adapter(checkpoint, "default", is_trainable=True)


class InitialPolicy(Trainer):
    """Mixin for TRL's preference trainers: the reference is the policy as it starts, and this is checked."""

    _initial_kept = False
    _start_checked = False

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        self._reference_given = ref_model is not None
        with copied_safely(model):
            super().__init__(model, ref_model, *args, **kwargs)
        self._keep_initial()

    def _keep_initial(self) -> None:
        policy = self.model
        if self._initial_kept or self._reference_given or not isinstance(policy, PeftModel):
            return
        self._initial_kept = True
        if REFERENCE in policy.peft_config or hides_start(policy):
            keep_initial(policy)
            if getattr(self, "_precompute_model_hash", None) is not None:
                # cached reference values of the model without the copy are not those of the initial policy
                vars(self)["_precompute_model_hash"] = hash_module(policy)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._keep_initial()  # the constructor computes the reference before it returns
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # whose own checkpoint has been loaded
            load_beside_reference(self.model if model is None else model, resume_from_checkpoint)

    def check_start(self, ratios: torch.Tensor, mask: torch.Tensor) -> None:
        """Look once, in the first micro-step of a run, whether policy and reference agree.

        They must where the reference is the policy as it starts: none was given, and nothing drops out.

        Args:
            ratios: (R,) log-ratios of policy to reference, summed over completions, nats.
            mask: (R, T) bool, the completion tokens.

        Raises:
            AdapterError: They differ though both are the model with its adapter, in float32 without dropout.
        """
        policy: Any = self.model
        if self._start_checked or not policy.training:
            return
        self._start_checked = True
        if self._reference_given or self.state.global_step > 0 or _drops_out(policy):
            return
        exact = policy.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        # some models drop out in functions, which only their configuration tells
        certain = exact and not any(
            isinstance(value, float) and value > 0
            for key, value in policy.config.get_text_config().to_dict().items()
            if "drop" in key
        )
        gap = start_gap(ratios, mask)
        if gap <= (_GAP if exact else _HALF_GAP):
            return
        found = (
            f"before the first step policy and reference differ by {gap:.2g} nats per token; they should be "
            "one model, and the loss is measured against something else. "
        )
        if not isinstance(self.accelerator.unwrap_model(policy), PeftModel):
            source = policy.config._name_or_path
            logger.warning(
                "%sThe reference was read from %r: if the policy was changed after loading, give ref_model.",
                found,
                source,
            )
            return
        found += "The adapter or the model was changed after the trainer was made: change it before."
        if certain:
            raise AdapterError(found)
        logger.warning(found)


def start_gap(ratios: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the largest |log-ratio| per completion token of any row, (R,) ratios and (R, T) mask."""
    return float((ratios.detach().abs() / mask.sum(dim=1).clamp(min=1)).max())


def _drops_out(policy: Any) -> bool:
    modules = (m for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    functional = getattr(policy.config.get_text_config(), "attention_dropout", 0.0)
    return bool(functional) or any(module.p > 0 for module in modules)


def harmless(config: PeftConfig) -> PeftConfig:
    """Return a configuration whose adapter has the same tensors, leaves the base alone."""
    neutral: Any = copy.deepcopy(config)
    if hasattr(neutral, "init_lora_weights"):
        neutral.init_lora_weights = True  # PiSSA and its kin would change the base a second time
    if getattr(neutral, "layer_replication", None):
        neutral.layer_replication = None  # the layers are replicated already
    if isinstance(neutral, AdaLoraConfig):
        neutral.inference_mode = True  # PEFT allows one that trains
    return neutral


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _measurable(policy: PeftModel) -> bool:
    tensors = list(policy.parameters())
    return not any(tensor.is_meta or hasattr(tensor, "ds_id") for tensor in tensors)


@torch.no_grad()
def _probe(policy: PeftModel) -> torch.Tensor:
    """Return the log-probabilities that ``policy`` gives to a few tokens spread over the vocabulary."""
    size = policy.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, 16, device=policy.device).long().view(1, 16)
    training = policy.training
    policy.eval()  # dropout belongs to training
    try:
        with before_training(policy):
            found: torch.Tensor = policy(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                labels=ids,
                fused_lm_head=True,
                use_cache=False,
            ).log_probs
    except Exception as error:
        kind = _kind(policy.peft_config[policy.active_adapters[0]])
        raise AdapterError(
            f"an adapter of type {kind} cannot be trained here: with it the model does not score tokens "
            f"({type(error).__name__}: {error}). Use another adapter type."
        ) from error
    finally:
        policy.train(training)
    return found[:, -ids.size(1) + 1 :].float()  # soft prompts come before the tokens


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one - other).abs() > _ROUNDING * other.abs().clamp(min=1.0)).any())
