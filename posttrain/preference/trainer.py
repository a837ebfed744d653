"""``posttrain.DPOTrainer``: TRL's trainer, same arguments, plus ``methods=`` and ``selection=``.

The trainer knows stages, not methods (:mod:`posttrain.preference.method`). TRL's own loss runs on the scores
that the stages make, so methods go with every ``loss_type`` that is defined for them, with LoRA, mixtures of
losses, WPO weights and mixture-of-experts terms. With ``methods=[]``, or with every method at its neutral
setting, losses, gradients and weights are TRL's, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trl import DPOConfig
from trl import DPOTrainer as TRLDPOTrainer

from posttrain.columns import ID, WithColumns, number_rows
from posttrain.guards import FiniteGuard
from posttrain.methods import setup_of, vet, write_reports
from posttrain.preference import diagnostics
from posttrain.preference.lists import ListPath
from posttrain.preference.method import Batch, Method
from posttrain.preference.passes import TwoAdapters, refuse, two_passes
from posttrain.preference.probe import Probing
from posttrain.rl.gauges import Gauges
from posttrain.selection.trainer import SelectionMixin

if TYPE_CHECKING:
    from datasets import Dataset

    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select

logger = logging.getLogger(__name__)


#: Where the policy's optimiser holds shards, and what methods train has one of its own.
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP)


class DPOTrainer(SelectionMixin, FiniteGuard, Probing, ListPath):
    """Direct preference optimisation with methods that compose.

    Args:
        *args: As ``trl.DPOTrainer``.
        methods: Methods in the order in which they act. Conflicts are refused here, before the model loads.
        selection: Which weights train: a plan, a selector, either with settings, or None for what TRL trains.
        probe_dataset: Prompts with completions that are in no pair, to see where probability goes; see
            :mod:`posttrain.preference.probe`.
        **kwargs: As ``trl.DPOTrainer``.

    Attributes:
        modules_of_methods: What methods train beside the policy, by their names.
        finished: Whether a method has finished the model, which then is not that of the last checkpoint.

    Raises:
        ValueError: Two methods of one name, or a setup that a method refuses.
        TypeError: An entry of ``methods`` is not a :class:`~posttrain.preference.method.Method`.
        posttrain.selection.plan.PlanError: The selection does not fit, or cannot be enforced here.
        FloatingPointError: During training, when a loss or gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        selection: SelectionPlan | Selector | Select | None = None,
        probe_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods: tuple[Method, ...] = tuple(methods)
        self._active = tuple(method for method in self.methods if not getattr(method, "neutral", False))
        given = inspect.signature(TRLDPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        adapter = isinstance(given.get("model"), PeftModel) or given.get("peft_config") is not None
        check_methods(self.methods, given.get("args"), adapter=adapter)
        self._replacing = next((method for method in self._active if method.replaces_loss), None)
        self.list_settings = next((m.lists for m in self._active if m.lists is not None), None)
        self._pair = next((method for method in self._active if isinstance(method, TwoAdapters)), None)
        self.finished = False
        self._numbered = any(method.wants_ids for method in self._active)
        self._gauges = Gauges()
        self._batch: Batch | None = None
        self._watched: dict[str, Any] = {}
        self._stepped = True
        self.modules_of_methods: dict[str, torch.nn.Module] = {}
        self._beside: torch.optim.Optimizer | None = None
        super().__init__(*args, **kwargs)
        self.start_probe(probe_dataset)
        self.start_lists()
        if self._numbered:
            self.data_collator = WithColumns(self.data_collator, (ID,))
        if self._pair is not None:
            refuse(self, self._pair, selection)
        self._start_methods()
        self.start_selection(selection)

    def _start_methods(self) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        for method in self._active:
            module = method.start(policy)
            if self.optimizer is not None and (module is not None or method is self._pair):
                raise ValueError(
                    f"{method.name} trains weights of its own, which the optimizer in `optimizers` does not "
                    "hold: give optimizer_cls_and_kwargs, or set optim in the DPOConfig"
                )
            if module is None:
                continue
            self.modules_of_methods[method.name] = module.to(self.args.device, torch.float32)
        kind = self.accelerator.distributed_type
        self._own_optimizer = bool(self.modules_of_methods) and kind in SHARDED
        if self._own_optimizer and self.args.fp16:
            raise ValueError(
                f"{', '.join(self.modules_of_methods)} trains weights beside the policy, whose gradients "
                f"{kind.value}'s loss scale for fp16 would blow up: use bf16"
            )

    # ---- rows -------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        if self._numbered and dataset_name == "train":
            counting = [method for method in self._active if method.wants_ids]
            names = ", ".join(method.name for method in counting)
            dataset, count, fingerprint = number_rows(dataset, names)
            for method in counting:
                method.number_rows(count, fingerprint)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        if self._numbered and ID not in known:
            self._signature_columns: Any = [*known, ID]

    # ---- stages -----------------------------------------------------------------------------------------

    @property
    def wants_kl(self) -> bool:
        """Whether a method asks for the exact KL."""
        return any("kl" in method.needs for method in self._active)

    @contextlib.contextmanager
    def on_reference(self, reference: torch.nn.Module) -> Iterator[None]:
        """Let methods watch the forward of the reference."""
        with contextlib.ExitStack() as stack:
            self._watched = {
                method.name: stack.enter_context(method.watch_reference(reference, self.mask.bool()))
                for method in self._active
            }
            yield

    def on_forward(
        self, outputs: Any, logps: torch.Tensor, ref_logps: torch.Tensor | None, ref_sums: torch.Tensor
    ) -> torch.Tensor | None:
        """Token weight, token score and row weight: how the scores differ from the log-ratios."""
        self._batch = batch = Batch(
            logps=logps,
            mask=self.mask.bool(),
            ref_logps=ref_logps,
            ref_sums=ref_sums,
            sums=self.weighed_sums(logps),
            beta=self.beta,
            kl=getattr(outputs, "kl", None),
            ids=self.ids,
            tokens=self.tokens,
            gauges=self._gauges,
            loss_types=tuple(self.loss_types),
            training=self._mode == "train",
            lists=self.lists,
            lengths=self.lengths,
        )
        ratios = batch.sums - ref_sums
        weighed, terms, rows = ratios, None, None
        token_weights = None
        for method in self._with(batch):
            weights = method.token_weights(batch)
            if weights is not None:
                token_weights = weights if token_weights is None else token_weights * weights
            scores = method.token_scores(batch)
            if scores is not None:
                summed = torch.where(batch.mask, scores, 0.0).sum(dim=1)
                terms = summed if terms is None else terms + summed
            row = method.row_weights(batch)
            if row is not None:
                rows = row if rows is None else rows * row
        if token_weights is not None:
            extra = torch.where(batch.mask, (token_weights - 1) * batch.log_ratios, 0.0)
            weighed = weighed + extra.sum(dim=1)
        if rows is not None:
            weighed = rows * weighed
        changed = token_weights is not None or rows is not None or terms is not None
        correction = weighed - ratios + (0.0 if terms is None else terms) if changed else None
        self.scores = ratios if correction is None else ratios + correction
        return correction

    def _with(self, batch: Batch) -> Iterator[Method]:
        """Yield the active methods, each with its gauges and what it watched."""
        for method in self._active:
            self._gauges.enter(method.name)
            batch.watched = self._watched.get(method.name)
            yield method

    def on_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Add what methods add; the loss of the one that replaces it takes the place of TRL's."""
        batch, scores = self._batch, self.scores
        assert batch is not None
        for method in self._with(batch):
            if method is self._replacing:
                loss = loss + method.loss(batch, scores)
            penalty = method.penalty(batch)
            if penalty is not None:
                loss = loss + penalty
            method.watch(batch, scores.detach())
        self._log_pairs(batch, scores.detach())
        self._batch, self._watched = None, {}
        if self._pair is None:
            del self.scores  # and with them the graph
        self.flush_gauges()
        return loss

    def flush_gauges(self) -> None:
        """Add what methods have logged to the numbers of this mode; collective."""
        means, maxima = self._gauges.flush(self.accelerator)
        for name, value in {**means, **maxima}.items():
            self._metrics[self._mode][name].append(value)

    def _log_pairs(self, batch: Batch, scores: torch.Tensor) -> None:
        how = diagnostics.Comparison(
            loss_types=batch.loss_types,
            beta=self.beta,
            divergence=str(self.f_divergence_type),
            coefficient=self.f_alpha_divergence_coef,
        )
        margin, tokens = None, self.tokens
        if batch.lists is not None:  # the best and the worst response of each
            rows = torch.cat([batch.lists.best, batch.lists.worst])
            kept = {
                name: getattr(batch, name)[rows] for name in ("logps", "mask", "sums", "ref_sums", "lengths")
            }
            batch, tokens = dataclasses.replace(batch, lists=None, ref_logps=None, **kept), tokens[rows]
        elif self._replacing is None:
            margin = diagnostics.margins(scores, batch.sums.detach(), self.lengths, how)
        diagnostics.log_pairs(self._gauges, batch, tokens, margin)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._pair is None or self._mode == "eval" or self.finished:
            return self.one_pass(model, inputs, return_outputs)
        return two_passes(self, self._pair, model, inputs)

    def one_pass(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Return TRL's loss, with what methods make of it, of the adapter that is active."""
        if self._replacing is None:
            return super()._compute_loss(model, inputs, return_outputs)
        weights = self.loss_weights
        self.loss_weights = [0.0] * len(weights)
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.loss_weights = weights

    # ---- optimiser --------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make TRL's optimiser, with what methods train in groups of their own."""
        fresh = self.optimizer is None
        if self._pair is not None:  # what does not require a gradient now never gets one
            self._pair.activate(self._pair.adapters[0])
        optimizer = super().create_optimizer(model)
        if fresh:
            if self._pair is not None:
                self._pair.regroup(optimizer)
            groups = [
                group
                for method in self._active
                if method.name in self.modules_of_methods
                for group in method.parameter_groups(self.modules_of_methods[method.name])
            ]
            if self._own_optimizer:
                cls, settings = self.get_optimizer_cls_and_kwargs(self.args)
                self._beside = cls(groups, **settings)
            else:
                for group in groups:
                    optimizer.add_param_group(group)
        return optimizer

    def _step_beside(self) -> None:
        """Step what methods train where the policy is sharded, at the learning rate of the policy."""
        assert self._beside is not None
        for group in self._beside.param_groups:
            group["lr"] = self._get_learning_rate()
        self._beside.step()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step; the last one of an optimiser step averages what DDP does not see."""
        if self._stepped:  # transformers clears the gradients of its model only
            for module in self.modules_of_methods.values():
                module.zero_grad()
        alone = self._pair is not None and self.accelerator.num_processes > 1
        with self.accelerator.no_sync(self.model_wrapped) if alone else contextlib.nullcontext():
            loss = super().training_step(*args, **kwargs)
        self._stepped = self.accelerator.sync_gradients
        if self._stepped:
            if self.accelerator.num_processes > 1:
                self._average_gradients()
                if self._pair is not None:
                    self._pair.average_gradients(self.accelerator)
            if self._own_optimizer:
                self._step_beside()
            if self._pair is not None and self.accelerator.scaler is None:
                self._pair.guard()
            for method in self._active:
                method.optimizer_step()
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; two adapters each by itself, as if they were alone."""
        if self._pair is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()  # a scaler allows it once per step
        served, other = (
            torch.nn.utils.clip_grad_norm_(module, self.args.max_grad_norm) for module in self._pair.trained()
        )
        del other
        return served

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; when it has come to its end, methods finish the model and write down what they report."""
        result = super().train(*args, **kwargs)
        for method in self._active:
            if type(method).finish is Method.finish:
                continue
            if self.state.global_step >= self.state.max_steps:
                method.finish(self.accelerator.unwrap_model(self.model))
                self.finished = True
            else:
                logger.warning("%s: training stopped early, the model was not finished", method.name)
        if self.args.should_save:
            write_reports(self._active, self.args.output_dir)
        return result

    def _average_gradients(self) -> None:
        for module in self.modules_of_methods.values():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    whole = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = self.accelerator.reduce(whole.contiguous(), reduction="mean")

    # ---- saving -----------------------------------------------------------------------------------------

    def save_modules(self, folder: str | Path) -> list[Path]:
        """Write what methods train into ``folder``, as METHOD.safetensors each; return the files."""
        written = []
        for name, module in self.modules_of_methods.items():
            path = Path(folder) / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)
            written.append(path)
        return written

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.save_modules(output_dir or self.args.output_dir or ".")

    def _load_best_model(self) -> None:
        super()._load_best_model()
        folder = Path(str(self.state.best_model_checkpoint))
        for name, module in self.modules_of_methods.items():
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))

    # ---- exact resume -----------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on, the state of every method included."""
        state = super().extra_state()
        state["methods"] = {method.name: method.state_dict() for method in self.methods}
        state["modules"] = {name: module.state_dict() for name, module in self.modules_of_methods.items()}
        if self._beside is not None:
            state["beside"] = self._beside.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            ValueError: The checkpoint was written with other methods.
        """
        saved, names = state.pop("methods", {}), [method.name for method in self.methods]
        if sorted(saved) != sorted(names):
            raise ValueError(
                f"the checkpoint was written with methods {sorted(saved)}, this run has {sorted(names)}: "
                "resume with the same methods, or start a new run"
            )
        for method in self.methods:
            method.load_state_dict(saved[method.name])
        for name, values in state.pop("modules", {}).items():
            self.modules_of_methods[name].load_state_dict(values)
        beside = state.pop("beside", None)
        if (beside is None) != (self._beside is None):
            logger.warning(
                "the checkpoint was written under another kind of sharding: the optimiser of what methods "
                "train (%s) begins anew",
                ", ".join(self.modules_of_methods),
            )
        elif self._beside is not None:
            self._beside.load_state_dict(beside)
        super().load_extra_state(state)


def check_methods(methods: Sequence[Method], config: DPOConfig | None, *, adapter: bool) -> None:
    """Refuse methods that cannot work in this setup; warn about doubtful ones.

    Raises:
        ValueError, TypeError: See :class:`DPOTrainer`.
    """
    listed = [method.name for method in methods if isinstance(method, Method) and method.lists is not None]
    others = [method for method in methods if isinstance(method, Method) and method.lists is None]
    pairs = [method.name for method in others if not method.for_lists or "kl" in method.needs]
    if listed and pairs:
        raise ValueError(
            f"{', '.join(pairs)} acts on pairs, {', '.join(listed)} trains on lists, whose rows are not half "
            "chosen and half rejected: drop one"
        )
    vet(methods, Method, setup_of(methods, config, DPOConfig, adapter=adapter), example="RPO(eta=0.005)")
