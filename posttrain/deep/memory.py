"""Memory forecast: what each process of a run will hold at its peak, by term, and what lowers the largest
one.

The step itself is traced (:mod:`posttrain.deep.trace`); what stands beside it is counted: a frozen reference,
optimiser state, gradient buckets of DDP, the cache of a rollout. The peak is the largest of three moments:
forward and backward, the optimiser's step, and generation. For more than one process the same terms are also
given for the ways to shard them:

========  ==========  ============  =========  ===========================================================
          weights     gradients     optimiser  beside them
========  ==========  ============  =========  ===========================================================
DDP       whole       twice         whole      the second is its buckets
ZeRO-2    whole       1/N           1/N        weights in fp32 beside bf16 ones, 1/N
ZeRO-3    1/N         1/N           1/N        the largest layer whole, twice: in use and fetched ahead
FSDP2     1/N         1/N           1/N        the same
========  ==========  ============  =========  ===========================================================

Not counted: the interpreter and its libraries (0.5 to 1 GiB on a CPU, the CUDA context on a GPU), what an
allocator keeps, what a kernel takes and gives back inside itself, and what methods hold beyond a reference.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from posttrain.deep.findings import Finding, Section
from posttrain.deep.live import LiveTensors
from posttrain.deep.subject import Subject
from posttrain.deep.trace import Device, Shape, Traced, fake_model, trace_step, unwrapped
from posttrain.errors import describe
from posttrain.models.adapter import build_peft_config
from posttrain.run.trainers import build_selection
from posttrain.selection.apply import DENSE_FROM
from posttrain.selection.grow import GrowingSelector
from posttrain.selection.plan import PlanError, SelectionPlan
from posttrain.selection.selector import ElementSelector
from posttrain.selection.settings import ADAMW

GIB = 2**30

MOMENTS = {
    "step": "forward and backward",
    "optimiser": "the optimiser's step",
    "generation": "sampling of completions",
}

STATE_BYTES = {"sgd": 0, "lion_32bit": 4, "lion_8bit": 1, "adamw_bnb_8bit": 2, "adamw_8bit": 2}
"""Bytes of state per scalar of optimisers that keep it in a type of their own."""

PROCESS = "rows and Python objects"
PROCESS_BYTES = 10 * 2**20
"""What runs on a CPU took beyond their tensors: 6 to 11 MiB (scripts/bench/memory_forecast.py --configs)."""

PACKED_BYTES = 12
"""Of a packed scalar beside its gradient and state: value, position, and the weight before training."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process.

    Attributes:
        device: What it was made for.
        shape: Of a forward-backward pass.
        moments: Total by moment: ``step``, ``optimiser``, ``generation``.
        terms: What the largest moment is made of, largest first.
        sharded: The terms by the way to launch; only for several processes.
        trainable: Scalars that train.
        advice: Settings that lower the largest term, best first.
        unused: What the LM head reserves and never writes to, which is no memory on a CPU.
    """

    device: Device
    shape: Shape
    moments: dict[str, int]
    terms: dict[str, int]
    sharded: dict[str, dict[str, int]]
    trainable: int
    advice: tuple[str, ...]
    unused: int

    @property
    def peak(self) -> int:
        """Bytes at the largest moment."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """The largest moment."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def largest(self) -> str:
        """The term that a setting can lower most."""
        return next(name for name in self.terms if name != PROCESS)

    def as_json(self) -> dict[str, Any]:
        """Return everything for JSON; sizes in bytes."""
        return {
            "device": self.device,
            "rows": self.shape.rows,
            "tokens": self.shape.tokens,
            "trainable": self.trainable,
            "peak": self.peak,
            "moment": self.moment,
            "moments": self.moments,
            "terms": self.terms,
            "sharded": self.sharded,
            "unused": self.unused,
            "advice": list(self.advice),
        }


@dataclass(frozen=True)
class Trained:
    """What trains, and what that takes."""

    prepare: Callable[[Any], Any] | None
    packed: int = 0
    dense: bool = False
    passing: frozenset[str] = frozenset()


def forecast(subject: Subject, longest: int, device: Device, traced: Traced | None = None) -> Forecast:
    """Return the memory that each process of a run takes.

    Args:
        subject: With model; processes are those of the launch that is meant.
        longest: Tokens of the longest sequence in training (prompt and completion).
        device: ``cuda`` or ``cpu``: they differ in the LM head and in the default of ``bf16``.
        traced: The step of such a run, where it was traced already for another number of processes.

    Raises:
        posttrain.selection.plan.PlanError, ValueError: The selection or the adapter does not fit the model.
    """
    values, task = subject.trainer, subject.config.task
    shape = _shape(subject, longest)
    trained = what_trains(subject)
    autocast = _autocast(subject, device)
    checkpointing = bool(values["gradient_checkpointing"])
    options: dict[str, Any] = {
        "device": device,
        "autocast": autocast,
        "prepare": trained.prepare,
        "passing": trained.passing,
        **_divergence(subject),
    }
    if traced is None:
        traced = trace_step(subject.model, shape, task, checkpointing=checkpointing, **options)
    standing = _standing(subject, traced, trained)
    if device == "cpu":
        standing[PROCESS] = PROCESS_BYTES
    moments: dict[str, dict[str, int]] = {}
    moments["step"] = {
        **standing,
        "gradients": traced.gradients_at_peak,
        "activations": traced.activations - traced.head,
        "logits of the LM head": traced.head,
    }
    moments["optimiser"] = {
        **standing,
        "gradients": traced.gradients,
        "steps of the optimiser": _working(subject, traced, device),
    }
    if subject.spec.generates and not values["use_vllm"]:
        moments["generation"] = standing | _generation(subject, shape, autocast, trained.prepare)
    elif subject.spec.generates and values["vllm_mode"] == "colocate":
        reserved = _reserved(values, device)
        if reserved:
            for terms in moments.values():
                terms["vLLM"] = 0 if values["vllm_enable_sleep_mode"] else reserved
            moments["generation"] = {**standing, "vLLM": reserved}
    totals = {name: sum(terms.values()) for name, terms in moments.items()}
    largest = max(totals, key=lambda name: totals[name])
    terms = dict(sorted(((k, v) for k, v in moments[largest].items() if v), key=lambda item: -item[1]))
    sharded = _sharded(subject, moments["step"], traced) if subject.processes > 1 else {}
    count = traced.trainable + (0 if trained.dense else trained.packed)
    found = Forecast(device, shape, totals, terms, sharded, count, (), traced.unused)
    return replace(found, advice=_advice(subject, found.largest, options, shape, traced))


def look_at_memory(subject: Subject, longest: int, device: Device) -> Section:
    """Return the forecast as a section; a model whose code cannot run on fake tensors gives a note."""
    title = "Memory of each process"
    try:
        found = forecast(subject, longest, device)
    except (PlanError, ValueError) as error:
        return Section("memory", title, (Finding("error", str(error)),))
    except Exception as error:  # of foreign code on tensors without storage
        return Section(
            "memory", title, (Finding("note", f"the step of this model cannot be traced: {describe(error)}"),)
        )
    return Section("memory", title, tuple(_findings(found)), found.as_json())


def _findings(found: Forecast) -> Iterator[Finding]:
    largest = found.largest
    size = capacity(found.device)
    what = f"{found.peak / GIB:.2f} GiB at the peak ({MOMENTS[found.moment]}), most of it {largest}"
    cure = "; or ".join(found.advice)
    if size is None:
        yield Finding("note", what, cure=cure)
    elif found.peak > size:
        yield Finding("error", f"{what}: more than the {size / GIB:.1f} GiB there are", cure=cure)
    else:
        close = found.peak > 0.85 * size
        yield Finding("warning" if close else "note", f"{what}, of {size / GIB:.1f} GiB", cure=cure)


def capacity(device: Device) -> int | None:
    """Return the bytes of the first GPU, or of this machine; None for a GPU that is not here."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


# ---- what trains ---------------------------------------------------------------------------------------


def _shape(subject: Subject, longest: int) -> Shape:
    values = subject.trainer
    rows = values["per_device_train_batch_size"] * (2 if subject.spec.pairs else 1)
    return Shape(rows, longest, min(values["gradient_accumulation_steps"], 2))


def _autocast(subject: Subject, device: Device) -> torch.dtype | None:
    values, written = subject.trainer, subject.config.trainer
    if values["fp16"]:
        return torch.float16
    # TRL turns bf16 on where nothing is written, and posttrain off again without an accelerator
    wanted = written.get("bf16", device == "cuda")
    return torch.bfloat16 if wanted else None


def what_trains(subject: Subject) -> Trained:
    """Return what trains in a run, and what that takes.

    Raises:
        posttrain.selection.plan.PlanError: What it selects is known only when it runs.
    """
    adapter, section = subject.config.model.adapter, subject.config.selection
    if adapter is not None:
        from peft import get_peft_model

        settings = adapter

        def add(model: Any) -> Any:
            return get_peft_model(model, build_peft_config(settings, model))

        return Trained(add)
    select = build_selection(section)
    if select is None:
        return Trained(None)
    model, what = _zeros(subject.model), select.what
    if isinstance(what, SelectionPlan):
        plan = what
    elif isinstance(what, (ElementSelector, GrowingSelector)):
        ranked, whole, left = what.split(model)
        names = set(whole)
        count = left if left is not None else sum(p.numel() for p in ranked.values())
        changing = isinstance(what, GrowingSelector)
        dense = select.backend == "masked" or (
            select.backend == "auto"
            and (changing or count > DENSE_FROM * sum(p.numel() for p in ranked.values()))
        )
        return _scalars(names, set(ranked), count, dense)
    elif what.needs == "nothing":
        plan = what.select(model, round=select.round)
    else:
        raise PlanError(f"{what.name} draws on examples or weights: what it selects is known when it runs")
    names = {name for name, part in plan.tensors.items() if part.kind == "all"}
    ranked_names = {name for name, part in plan.tensors.items() if part.partial}
    return _scalars(names, ranked_names, plan.count - sum(plan.tensors[n].numel for n in names), False)


def _scalars(whole: set[str], partial: set[str], count: int, dense: bool) -> Trained:
    """Return what trains where some tensors do as a whole and some in part."""

    def freeze(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in whole or name in partial)
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        return model

    # a packed tensor is read as one that trains; of its gradient the selected scalars are kept
    return Trained(freeze, count, dense, frozenset() if dense else frozenset(partial))


def _zeros(skeleton: Any) -> Any:
    """Return a model of the same shapes on the CPU without their memory: each weight is one number."""
    model = copy.deepcopy(skeleton)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    unwrapped(model).tie_weights()
    return model


# ---- terms ---------------------------------------------------------------------------------------------


def _standing(subject: Subject, traced: Traced, trained: Trained) -> dict[str, int]:
    """Return what is there at every moment."""
    terms = {"weights": traced.weights, "optimiser": _state(subject, traced, trained)}
    if _has_reference(subject):
        terms["reference model"] = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    if trained.packed and not trained.dense:
        terms["packed values"] = trained.packed * (PACKED_BYTES + 4)  # their gradients are there with them
    if subject.processes > 1:
        terms["DDP buckets"] = traced.gradients + (0 if trained.dense else 4 * trained.packed)
    return terms


def _has_reference(subject: Subject) -> bool:
    """Whether a second, frozen model stands beside the one that trains."""
    values, task = subject.trainer, subject.config.task
    if subject.config.model.adapter is not None or hasattr(subject.model, "peft_config"):
        return False
    if task == "preference":
        return not values["precompute_ref_log_probs"]
    if not subject.spec.generates:
        return False
    from posttrain.rl import registry

    methods = registry.build(subject.config.methods)
    needs = {need for method in methods for need in method.needs}
    return bool(values["beta"]) or bool(needs & {"ref_logps", "movable_reference"})


def _divergence(subject: Subject) -> dict[str, bool]:
    """Return whether methods on pairs ask for the exact divergence, and for the reference's states."""
    if subject.config.task != "preference":
        return {}
    from posttrain.preference import registry

    methods = registry.build(subject.config.methods)
    return {
        "kl": any("kl" in method.needs for method in methods),
        "states": any(method.keeps_states for method in methods),
    }


def _state(subject: Subject, traced: Traced, trained: Trained) -> int:
    name = str(subject.trainer["optim"] or "adamw_torch_fused")
    per_scalar = STATE_BYTES.get(name)
    moments = 6 if _masters(subject, traced) else 2  # two moments in the type of the weights, or all in fp32
    if trained.packed:
        whole = 0 if trained.dense else moments * traced.gradients
        return whole + trained.packed * (12 if trained.dense else 8)  # positions, or none
    if per_scalar is not None:
        return per_scalar * traced.trainable
    if name == "adafactor":
        return traced.gradients // 100  # rows and columns
    return moments * traced.gradients


def _masters(subject: Subject, traced: Traced) -> bool:
    """Whether weights in half precision have moments and a copy in fp32."""
    section = subject.config.selection
    name = str(subject.trainer["optim"] or "adamw_torch_fused")
    half = traced.gradients < 4 * traced.trainable
    return section is not None and section.master_weights and half and name in ADAMW


def _working(subject: Subject, traced: Traced, device: Device) -> int:
    """Return what an optimiser's step takes for itself."""
    name = str(subject.trainer["optim"] or "adamw_torch_fused")
    return traced.gradients if name == "adamw_torch" and device == "cuda" else 0  # for all tensors at once


def _reserved(values: Mapping[str, Any], device: Device) -> int:
    """Return what vLLM in the same process keeps for itself; 0 where the size of the GPU is unknown."""
    if device != "cuda" or not torch.cuda.is_available():
        return 0
    total = torch.cuda.get_device_properties(0).total_memory
    return int(total * float(values["vllm_gpu_memory_utilization"] or 0.3))


def _generation(
    subject: Subject,
    shape: Shape,
    autocast: torch.dtype | None,
    prepare: Callable[[Any], Any] | None,
) -> dict[str, int]:
    """Return cache and working memory of ``generate`` on the rows that one process samples at a time."""
    values = subject.trainer
    per_device = values["per_device_train_batch_size"]
    steps = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    size = values["generation_batch_size"]
    rows = size // subject.processes if size is not None else per_device * steps
    prompt = shape.tokens - int(values["max_completion_length"])
    with fake_model(subject.model, prepare) as model, torch.no_grad():
        model.eval()
        context = torch.autocast("cpu", autocast) if autocast else torch.autocast("cpu", enabled=False)
        with context:
            filled = DynamicCache(config=unwrapped(model).config)
            live = LiveTensors([*model.parameters(), *model.buffers()])
            with live:
                _forward(model, rows, max(prompt, 1), filled, max(prompt, 1))
            opened = live.peak - live.held
            del live
            grown, parts = _grown(filled, rows, shape.tokens - 1)
            cache = sum(tensor.untyped_storage().nbytes() for tensor in parts)
            live = LiveTensors([*model.parameters(), *model.buffers(), *parts])
            parts.clear()  # a layer's part goes when the longer one has taken its place
            with live:
                logits = _forward(model, rows, 1, grown, shape.tokens)
                probabilities = torch.softmax(logits.float().clone(), -1)
                torch.multinomial(probabilities, 1)
            working = live.peak - live.held
    if opened > cache + working:
        return {"opening of the prompts": opened}
    return {"cache of the rollout": cache, "sampling": working}


def _forward(model: Any, rows: int, tokens: int, cache: Any, seen: int) -> torch.Tensor:
    outputs = model(
        input_ids=torch.ones(rows, tokens, dtype=torch.long),
        attention_mask=torch.ones(rows, seen, dtype=torch.long),
        position_ids=torch.arange(seen - tokens, seen).expand(rows, tokens),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = outputs.logits[:, -1]
    return logits


def _grown(filled: Any, rows: int, tokens: int) -> tuple[Any, list[torch.Tensor]]:
    """Return a cache of so many tokens, in the shapes of one that was filled, and its tensors."""
    cache, tensors = DynamicCache(), []
    for index, layer in enumerate(filled.layers):
        pair = [old.new_empty(rows, old.size(1), tokens, old.size(3)) for old in (layer.keys, layer.values)]
        cache.update(pair[0], pair[1], index)
        made: Any = cache.layers[index]
        tensors += [made.keys, made.values]
    return cache, tensors


# ---- launches ------------------------------------------------------------------------------------------


def _sharded(subject: Subject, step: Mapping[str, int], traced: Traced) -> dict[str, dict[str, int]]:
    """Return the terms of the training step by the way to launch."""
    ranks = subject.processes
    reduced = 2 if traced.gradients < 4 * traced.trainable else 4
    parts = dict(step)
    buckets = parts.pop("DDP buckets", 0)
    reference = parts.get("reference model", 0)
    layer = 2 * traced.weights // max(_layers(subject.model), 1)
    kept = reduced == 4 or _masters(subject, traced)  # in fp32 already, whatever launches it
    wider, master = (1, 0) if kept else (2, 4 * traced.trainable)
    zero2 = parts | {
        "gradients": traced.gradients // ranks,
        "optimiser": (parts["optimiser"] * wider + master) // ranks,
    }
    zero3 = zero2 | {"weights": traced.weights // ranks, "layers in use": layer}
    fsdp = parts | {
        "weights": traced.weights // ranks,
        "gradients": traced.gradients // ranks,
        "optimiser": parts["optimiser"] // ranks,
        "layers in use": layer,
    }
    if reference:
        zero3["reference model"] = fsdp["reference model"] = reference // ranks
    return {"DDP": parts | {"DDP buckets": buckets}, "ZeRO-2": zero2, "ZeRO-3": zero3, "FSDP2": fsdp}


def _layers(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))


# ---- advice --------------------------------------------------------------------------------------------


def _advice(
    subject: Subject, largest: str, options: dict[str, Any], shape: Shape, traced: Traced
) -> tuple[str, ...]:
    """Return settings that lower the largest term, with what they bring where that is traced."""
    values, adapter = subject.trainer, subject.config.model.adapter is not None
    task, many = subject.config.task, subject.processes > 1
    found = []
    if largest == "activations":
        if not values["gradient_checkpointing"]:
            other = trace_step(subject.model, shape, task, checkpointing=True, **options)
            saved = traced.activations - other.activations
            found.append(
                f"trainer.gradient_checkpointing: true (saves {saved / GIB:.2f} GiB, costs a forward)"
            )
        if values["per_device_train_batch_size"] > 1:
            found.append(
                "halve trainer.per_device_train_batch_size and double trainer.gradient_accumulation_steps"
            )
        length = "trainer.max_completion_length" if subject.spec.generates else "trainer.max_length"
        found.append(f"lower {length}, or leave out the longest rows: a batch is as wide as its longest")
    elif largest == "logits of the LM head":
        found.append("halve trainer.per_device_train_batch_size: tiles of logits hold at most 4096 tokens")
    elif largest in ("optimiser", "gradients", "packed values", "DDP buckets"):
        if not adapter:
            found.append("model.adapter: {type: lora, r: 16}: state and gradients of the adapter only")
        if subject.config.selection is None and not adapter:
            found.append("selection: {random: {budget: 0.01}} or another selector with a budget")
        if many:
            found.append("shard them: accelerate launch with DeepSpeed ZeRO-2, ZeRO-3 or FSDP2")
        found.append("trainer.optim: adamw_bnb_8bit on a GPU (2 bytes of state for each scalar)")
    elif largest == "weights":
        if subject.config.model.dtype == "auto" and next(subject.model.parameters()).dtype == torch.float32:
            found.append("model.dtype: bfloat16 halves them (with an adapter, or a careful learning rate)")
        if many:
            found.append("shard them: accelerate launch with DeepSpeed ZeRO-3 or FSDP2")
        found.append("a smaller model.path")
    elif largest == "reference model":
        found.append("model.adapter: {type: lora}: the reference is then the model without it")
        if task == "preference":
            found.append("trainer.precompute_ref_log_probs: true: scored once, before training")
    elif largest in ("cache of the rollout", "sampling", "opening of the prompts"):
        found.append(
            "lower trainer.per_device_train_batch_size, or steps_per_generation: fewer completions at a time"
        )
        found.append("lower trainer.max_completion_length")
    elif largest == "vLLM":
        found.append("lower trainer.vllm_gpu_memory_utilization, or set vllm_enable_sleep_mode: true")
    return tuple(found)
