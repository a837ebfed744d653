"""``posttrain.SFTTrainer``: TRL's trainer with methods, selection, exact resume, a stop at bad numbers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from posttrain.columns import ID, WithColumns, number_rows
from posttrain.guards import FiniteGuard
from posttrain.methods import setup_of, vet, write_reports
from posttrain.rl.gauges import Gauges
from posttrain.selection.plan import PlanError
from posttrain.selection.trainer import SelectionMixin
from posttrain.sft.method import Method, MicroStep
from posttrain.sft.unlearn import row_nll
from posttrain.sharding import before_training

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select

logger = logging.getLogger(__name__)

_REFERENCE = "reference_nll"


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

    Attributes:
        finished: Whether a method has finished the model, which then is not that of the last checkpoint.

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
        self._replacing = next((m for m in self._active if getattr(m, "replaces_loss", False)), None)
        self._columns: tuple[str, ...] = ()
        self._open: MicroStep | None = None
        self._place = (-1, 0)
        self._totals: dict[str, torch.Tensor] = {}
        self._reference: float | None = None
        given = inspect.signature(TRLSFTTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        adapter = isinstance(given.get("model"), PeftModel) or given.get("peft_config") is not None
        check_methods(self.methods, given.get("args"), adapter=adapter)
        self._draws = 0
        self.finished = False
        self._gauges = Gauges()
        self._columns = tuple(dict.fromkeys(name for method in self._active for name in method.columns))
        if any(method.wants_ids for method in self._active):
            self._columns = (*self._columns, ID)
        super().__init__(*args, **kwargs)
        if self._active:
            self._refuse_late()
        if self._columns:
            self._take_columns()
        for method in self._active:
            if type(method).optimizer is not Method.optimizer and selection is not None:
                raise ValueError(
                    f"{method.name} has an optimiser of its own, as a selection has: use one of them"
                )
            method.start(self.accelerator.unwrap_model(self.model), self._retained)
        self.start_selection(selection)

    def _refuse_late(self) -> None:
        """Refuse what is known once the model and the launcher are."""
        names = ", ".join(method.name for method in self._active)
        kind = self.accelerator.distributed_type
        sharded = kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
        whole = ", ".join(method.name for method in self._active if not method.any_launch)
        if sharded and whole:
            raise ValueError(f"{whole} needs whole weights, {kind.value} shards them: launch with plain DDP")
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

        if self._replacing is not None and self.aux_loss_enabled:
            raise ValueError(
                f"{self._replacing.name} replaces the loss, and with it the router loss of this model: set "
                "model.config.output_router_logits to false"
            )

    # ---- columns ----------------------------------------------------------------------------------------

    def _take_columns(self) -> None:
        """Let the columns that methods read through to the micro-step."""
        names = ", ".join(method.name for method in self._active if method.columns)
        if ID in self._columns and self._skip_prepare_dataset:
            self.train_dataset = self._number(self.train_dataset)
        rows: Any = self.train_dataset
        found = rows.column_names
        for name in self._columns:
            if name not in (_REFERENCE, ID) and found is not None and name not in found:
                raise ValueError(
                    f"{names} reads the column {name!r} of the training data, found {', '.join(found)}: add "
                    f"it (true or false), or rename yours with data.columns: {{{name}: YOURS}}"
                )
        if _REFERENCE in self._columns:
            if not isinstance(rows, Dataset):
                raise ValueError(
                    f"{names} scores every row first, which a stream cannot give: load it in full"
                )
            self.train_dataset = self._with_reference(rows)
        self.data_collator = WithColumns(self.data_collator, self._columns)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(TRLSFTTrainer._prepare_dataset).bind(self, dataset, *args, **kwargs)
        if given.arguments["dataset_name"] == "train":
            dataset = self._number(dataset)
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _number(self, rows: Any) -> Any:
        """Give rows ids, for methods that want them."""
        counting = [method for method in self._active if method.wants_ids]
        if counting:
            rows, count, fingerprint = number_rows(rows, ", ".join(method.name for method in counting))
            for method in counting:
                method.number_rows(count, fingerprint)
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*known, *(name for name in self._columns if name not in known)]

    def _with_reference(self, rows: Dataset) -> Dataset:
        """Return the rows with their mean token NLL under the model as it is now; see Method.columns."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        wanted = [place for place, forget in enumerate(rows["forget"]) if forget]
        own, size = wanted[rank::ranks], self.args.per_device_train_batch_size
        inputs = self._remove_unused_columns(rows, description="training")
        model: Any = self.model
        training, values = model.training, []
        model.eval()
        with torch.no_grad(), self.accelerator.autocast(), before_training(model):
            for start in range(0, len(own), size):
                picked = [inputs[place] for place in own[start : start + size]]
                batch = self._prepare_inputs(self.data_collator(picked))
                outputs = model(**batch | {"use_cache": False}, fused_lm_head=True)
                values += row_nll(outputs.log_probs, outputs.label_mask).tolist()
        model.train(training)
        found = gather_object(list(zip(own, values, strict=True)))
        scores = [0.0] * len(rows)
        for place, value in found:
            scores[place] = value
        self._reference = sum(scores) / max(len(wanted), 1)
        if _REFERENCE in rows.column_names:
            rows = rows.remove_columns(_REFERENCE)
        return rows.add_column(_REFERENCE, scores)

    def _split_columns(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        columns = {name: inputs[name] for name in self._columns if name in inputs}
        return {name: value for name, value in inputs.items() if name not in columns}, columns

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of an optimiser step, having counted what methods want counted."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        for method in self._active:
            counts = [method.counts(*self._split_columns(batch)) for batch in samples]
            if counts and len(counts[0]):
                local = torch.tensor(counts, dtype=torch.float64).sum(dim=0).float()
                self._totals[method.name] = self.accelerator.reduce(local.to(self.args.device), "sum")
        return samples, items

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One evaluation batch, by TRL's own loss."""
        return super().prediction_step(model, self._split_columns(inputs)[0], *args, **kwargs)

    # ---- micro-step -------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """TRL's loss and metrics; in training the loss of the method that replaces it."""
        if self._replacing is None or self._open is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with _kept_outputs(model) as kept:
            super().compute_loss(model, inputs, False, num_items_in_batch)
        outputs = kept[-1]
        if not outputs.log_probs.requires_grad:
            raise ValueError(
                f"{self._replacing.name} replaces the loss, and compute_loss_func or label smoothing would "
                "too: use one of them"
            )
        self._gauges.enter(self._replacing.name)
        loss = self._replacing.loss(self._open, outputs) * self.accelerator.num_processes
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            loss = loss * self.current_gradient_accumulation_steps  # transformers divides by it
        self._refuse_nonfinite(loss, inputs)
        return loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """TRL's forward and backward, with the methods around and behind them."""
        if not self._active:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        step, before = self.state.global_step, self._place
        self._place = (step, before[1] + 1 if before[0] == step else 0)
        passes = self._passes(inputs)
        losses = []
        for number, (group, rows) in enumerate(passes):
            # DDP sums gradients over ranks in the last pass
            last = number == len(passes) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses.append(self._pass(model, rows, num_items_in_batch, group))
        if self.accelerator.sync_gradients:
            for method in self._active:
                method.optimizer_step()
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _passes(self, inputs: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Return what goes forward and backward apart; the same groups on every rank."""
        columns = self._split_columns(inputs)[1]
        found = [(m, m.groups(columns, self._place)) for m in self._active]
        method, groups = next(((m, groups) for m, groups in found if groups), (None, {}))
        if method is None:
            return [("", inputs)]
        counts = torch.stack([mask.sum() for mask in groups.values()]).to(self.args.device)
        counts = self.accelerator.reduce(counts.float(), "sum")
        self._gauges.enter(method.name)
        for name, mask in groups.items():
            self._gauges.mean(name, mask.float())
        passes = []
        size = len(inputs["labels"])
        for (name, mask), count in zip(groups.items(), counts.tolist(), strict=True):
            if not count:
                continue
            own = bool(mask.any())
            picked = (
                mask.nonzero().flatten() if own else torch.zeros(1, dtype=torch.int64, device=mask.device)
            )
            rows = {
                key: value[picked.to(value.device)]
                if isinstance(value, torch.Tensor) and value.dim() and len(value) == size
                else value
                for key, value in inputs.items()
            }
            if not own:  # other ranks have such rows: go along, without a label
                rows["labels"] = torch.full_like(rows["labels"], -100)
            passes.append((name, rows))
        return passes

    def _pass(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, group: str
    ) -> torch.Tensor:
        if group and num_items_in_batch is None:
            raise ValueError(
                "groups of rows need the tokens of the whole step, which this model does not take"
            )
        step = self._micro_step(model, inputs)
        step.group = group
        with ExitStack() as stack:
            seen = [stack.enter_context(method.around(step)) for method in self._active]
            self._open = step
            stack.callback(setattr, self, "_open", None)
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
        inputs, columns = self._split_columns(inputs)
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
            columns=columns,
            totals=self._totals,
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser, that of a method if one has its own."""
        target: Any = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(target))
            named = [(name, p) for name, p in target.named_parameters() if p.requires_grad]
            groups = [
                {
                    "params": [p for name, p in named if (name in decayed) == decays],
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ]
            for method in self._active:
                made = method.optimizer(
                    self.accelerator.unwrap_model(target),
                    [group for group in groups if group["params"]],
                    lr=self.args.learning_rate,
                    betas=(self.args.adam_beta1, self.args.adam_beta2),
                    eps=self.args.adam_epsilon,
                )
                if made is not None:
                    self.optimizer = made
                    return self.optimizer
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; when it has come to its end, methods finish the model."""
        result = super().train(*args, **kwargs)
        for method in self._active:
            if self.state.global_step >= self.state.max_steps:
                method.finish(self.accelerator.unwrap_model(self.model))
                self.finished |= type(method).finish is not Method.finish
            elif type(method).finish is not Method.finish:
                logger.warning("%s: training stopped early, the model was not finished", method.name)
        if self.args.should_save:
            write_reports(self._active, self.args.output_dir)
        return result

    def _retained(self, count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.selection_examples(count, ("forget", "retain"))["retain"]
        return found

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

    def selection_examples(self, count: int, groups: Sequence[str] = ()) -> Any:
        """Return batches of one row each: the first ``count`` of a shuffle, the same on every rank.

        Args:
            count: How many, of each group.
            groups: ``("forget", "retain")`` for two sets by name, as the column ``forget`` has it.

        Raises:
            PlanError: The data are a stream, or have no such column.
        """
        if not isinstance(self.train_dataset, Dataset):
            raise PlanError(
                "examples for a selector cannot be drawn from a stream: load the data set in full"
            )
        rows, order = self._own_rows, self._order(0)

        def taken(places: Sequence[int]) -> list[dict[str, Any]]:
            batches = [self._prepare_inputs(self.data_collator([rows[place]])) for place in places[:count]]
            return [self._split_columns(batch)[0] for batch in batches]

        if not groups:
            return taken(order.tolist())
        if tuple(groups) != ("forget", "retain") or "forget" not in self.train_dataset.column_names:
            raise PlanError(
                f"the selector compares examples of {', '.join(groups)}: mark the rows of the training data "
                f"with a column 'forget' (true or false), found {', '.join(self.train_dataset.column_names)}"
            )
        marks = self.train_dataset["forget"][:]
        return {
            name: taken(
                [
                    place
                    for place in order.tolist()
                    if marks[place] is not None and bool(marks[place]) == wanted
                ]
            )
            for name, wanted in (("forget", True), ("retain", False))
        }

    def _another(self) -> dict[str, Any]:
        """Return the next micro-batch of a shuffle of the training data that is not the trainer's."""
        ranks, size = self.accelerator.num_processes, self.args.train_batch_size
        start = (self._draws * ranks + self.accelerator.process_index) * size
        self._draws += 1
        rows = self._own_rows
        picked = [divmod(position, len(rows)) for position in range(start, start + size)]
        batch = self.data_collator([rows[int(self._order(epoch)[place])] for epoch, place in picked])
        return self._split_columns(self._prepare_inputs(batch))[0]

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
            "reference": self._reference,
            "fingerprints": [method.fingerprint() for method in self._active],
            "states": {method.name: method.state_dict() for method in self._active},
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
        reference, prints = state.pop("reference", None), state.pop("fingerprints", None)
        if prints is not None and prints != [method.fingerprint() for method in self._active]:
            raise ValueError(
                f"the checkpoint was written with other choices of {', '.join(names)} than this run made: "
                "build the trainer with the model, the data and the settings that training began with"
            )
        if (reference is None) != (self._reference is None) or abs(
            (reference or 0) - (self._reference or 0)
        ) > 1e-2:
            raise ValueError(
                f"the reference scores of the forget rows are {self._reference} on average, the checkpoint "
                f"was written with {reference}: build the trainer with the model that training began with"
            )
        states = state.pop("states", {})
        for method in self._active:
            method.load_state_dict(states.get(method.name, {}))
        super().load_extra_state(state)


@contextmanager
def _kept_outputs(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Give the outputs of each forward of ``model`` meanwhile."""
    kept: list[Any] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args
        kept.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def check_methods(methods: Sequence[Method], config: Any, *, adapter: bool) -> None:
    """Refuse methods that cannot work in this setup; warn about doubtful ones.

    Raises:
        ValueError, TypeError: See :class:`SFTTrainer`.
    """
    vet(methods, Method, setup_of(methods, config, SFTConfig, adapter=adapter), example="LfU(alpha=0.1)")
