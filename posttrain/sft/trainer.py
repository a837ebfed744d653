"""``posttrain.SFTTrainer``: TRL's trainer with methods, selection, exact resume, a stop at bad numbers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from posttrain.guards import FiniteGuard
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Setup
from posttrain.selection.plan import PlanError
from posttrain.selection.trainer import SelectionMixin
from posttrain.sft.method import Method, MicroStep

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select

logger = logging.getLogger(__name__)


class SFTTrainer(SelectionMixin, FiniteGuard, TRLSFTTrainer):
    """Supervised fine-tuning; same arguments and same numbers as ``trl.SFTTrainer``, plus ``methods`` and
    ``selection``.

    With ``methods=[]``, or with every method at its neutral setting, nothing is added and the result is
    TRL's, bit for bit.

    Args:
        *args: As ``trl.SFTTrainer``.
        methods: Methods in the order in which they act. Conflicts are refused here, before the model loads.
        selection: Which weights train: a plan, a selector, either with settings, or None for what TRL trains.
        **kwargs: As ``trl.SFTTrainer``.

    Raises:
        ValueError: Two methods of one name, or a setup that a method refuses.
        TypeError: An entry of ``methods`` is not a :class:`~posttrain.sft.method.Method`.
        FloatingPointError: During training, when a loss or gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        selection: SelectionPlan | Selector | Select | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods: tuple[Method, ...] = tuple(methods)
        self._active = tuple(method for method in self.methods if not getattr(method, "neutral", False))
        given = inspect.signature(TRLSFTTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        adapter = isinstance(given.get("model"), PeftModel) or given.get("peft_config") is not None
        check_methods(self.methods, given.get("args"), adapter=adapter)
        self._draws = 0
        self._gauges = Gauges()
        super().__init__(*args, **kwargs)
        if self._active:
            self._refuse_late()
        self.start_selection(selection)

    def _refuse_late(self) -> None:
        """Refuse what is known once the model and the launcher are."""
        names = ", ".join(method.name for method in self._active)
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise ValueError(f"{names} needs whole weights, {kind.value} shards them: launch with plain DDP")
        if self.args.n_gpu > 1:
            raise ValueError(f"{names} needs one process per device: start with accelerate launch")
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(f"{names} needs an adapter inside the layers, such as LoRA; found a soft prompt")
        if any(method.wants_another for method in self._active) and not isinstance(
            self.train_dataset, Dataset
        ):
            raise ValueError(
                f"{names} draws batches of its own, which a stream cannot give: load the data set in full, "
                "or use the batch that trains (lfu.ascent_batch: same)"
            )

    # ---- micro-step -------------------------------------------------------------------------------------

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """TRL's forward and backward, with the methods around and behind them."""
        if not self._active:
            return super().training_step(model, inputs, num_items_in_batch)
        step = self._micro_step(model, self._prepare_inputs(inputs))
        with ExitStack() as stack:
            seen = [stack.enter_context(method.around(step)) for method in self._active]
            loss = super().training_step(model, step.inputs, num_items_in_batch)
        for method, watched in zip(self._active, seen, strict=True):
            self._gauges.enter(method.name)
            added = method.after_backward(step, watched)
            if added is not None:
                if not bool(torch.isfinite(added)):
                    raise FloatingPointError(
                        f"{method.name} adds {added.item()} to the loss after {self.state.global_step} "
                        "optimiser steps: lower its weight or the learning rate"
                    )
                loss = loss + added.to(loss.dtype)
        means, maxima = self._gauges.flush(self.accelerator)
        for name, value in {**means, **maxima}.items():
            self._metrics["train"][name].append(value)
        return loss

    def _micro_step(self, model: Any, inputs: dict[str, Any]) -> MicroStep:
        policy = self.accelerator.unwrap_model(model)
        core: Any = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return MicroStep(
            model=policy,
            decoder=core.base_model,
            inputs=inputs,
            parameters=parameters,
            positions={} if self.selection is None else self.selection.positions,
            share=1 / self.current_gradient_accumulation_steps,
            autocast=self.accelerator.autocast,
            another=self._another,
            backward=functools.partial(self._add_gradient, parameters),
            gauges=self._gauges,
        )

    def _add_gradient(self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor | None) -> None:
        """Add the gradient of a loss that did not go through DDP's forward, which would not average it."""
        ranks = self.accelerator.num_processes
        if ranks == 1:
            if loss is not None:
                loss.backward()
            return
        found: Sequence[torch.Tensor | None] = [None] * len(parameters)
        if loss is not None:
            found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if self.accelerator.sync_gradients:  # DDP has averaged what came before; else it is still to come
                whole = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
                gradient = self.accelerator.reduce(whole, reduction="mean")
            if gradient is not None:
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.add_(gradient)

    def selection_examples(self, count: int) -> list[dict[str, Any]]:
        """Return batches of one row each: the first ``count`` of a shuffle, the same on every rank.

        Raises:
            PlanError: The data are a stream.
        """
        if not isinstance(self.train_dataset, Dataset):
            raise PlanError(
                "examples for a selector cannot be drawn from a stream: load the data set in full"
            )
        rows, order = self._own_rows, self._order(0)
        return [self._prepare_inputs(self.data_collator([rows[int(place)]])) for place in order[:count]]

    def _another(self) -> dict[str, Any]:
        """Return the next micro-batch of a shuffle of the training data that is not the trainer's."""
        ranks, size = self.accelerator.num_processes, self.args.train_batch_size
        start = (self._draws * ranks + self.accelerator.process_index) * size
        self._draws += 1
        rows = self._own_rows
        picked = [divmod(position, len(rows)) for position in range(start, start + size)]
        batch = self.data_collator([rows[int(self._order(epoch)[place])] for epoch, place in picked])
        prepared: dict[str, Any] = self._prepare_inputs(batch)
        return prepared

    @functools.cached_property
    def _own_rows(self) -> Any:
        return self._remove_unused_columns(self.train_dataset, description="training")

    @functools.lru_cache(maxsize=2)  # noqa: B019, as long as the trainer
    def _order(self, epoch: int) -> torch.Tensor:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return torch.randperm(
            len(self._own_rows), generator=torch.Generator().manual_seed((seed << 20) + 1 + epoch)
        )

    # ---- exact resume -----------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on, that of the methods included."""
        return {
            **super().extra_state(),
            "methods": [method.name for method in self.methods],
            "draws": self._draws,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            ValueError: The checkpoint was written with other methods.
        """
        saved, names = state.pop("methods", []), [method.name for method in self.methods]
        if saved != names:
            raise ValueError(
                f"the checkpoint was written with methods {saved}, this run has {names}: resume with the "
                "same methods, or start a new run"
            )
        self._draws = state.pop("draws", 0)
        super().load_extra_state(state)


def check_methods(methods: Sequence[Method], config: Any, *, adapter: bool) -> None:
    """Refuse methods that cannot work in this setup; warn about doubtful ones.

    Raises:
        ValueError, TypeError: See :class:`SFTTrainer`.
    """
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"methods takes instances such as LfU(alpha=0.1), found {method!r}")
    names = tuple(method.name for method in methods)
    if len(set(names)) < len(names):
        raise ValueError(f"each method may be given once, found {', '.join(names)}")
    fields = {name: entry.default for name, entry in SFTConfig.__dataclass_fields__.items()}
    setup = Setup(
        trainer=fields if config is None else vars(config),
        methods=names,
        adapter=adapter,
        ranks=1 if config is None else config.world_size,
    )
    conflicts = [conflict for method in methods for conflict in method.conflicts(setup)]
    fatal = [conflict.message for conflict in conflicts if conflict.fatal]
    if fatal:
        raise ValueError("; ".join(fatal))
    for conflict in conflicts:
        logger.warning(conflict.message)
