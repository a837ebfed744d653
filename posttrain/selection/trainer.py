"""``selection=`` for trainers: a mixin over any transformers Trainer with exact resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from accelerate.utils import DistributedType, broadcast, gather_object
from safetensors.torch import load_file, save_file

from posttrain.checkpointing.resume import CheckpointError, ExactResume
from posttrain.selection.adamw import SelectiveAdamW
from posttrain.selection.apply import Selection, apply, is_packed_name
from posttrain.selection.grow import GrowingSelector, Growth
from posttrain.selection.packed import SUFFIX, packed_tensors, pull_to_base
from posttrain.selection.plan import PlanError, SelectionPlan
from posttrain.selection.settings import ADAMW, SWALLOWED_BELOW, Backend, Decay, Select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from posttrain.selection.selector import Selector

logger = logging.getLogger(__name__)

VALUES_FILE = "selected.safetensors"
"""In a checkpoint: the packed values by the name of the weight, in fp32."""

PLAN_FILE = "selection.safetensors"
"""In a checkpoint: the plan in force, once a selection has shrunk."""

_OTHER_SELECTION = (
    "the checkpoint was written with another selection of weights than this run has: resume with the same "
    "selection (its plan file, or the same settings and seed), or start a new run"
)


class SelectionMixin(ExactResume):
    """Trains what a plan selects.

    With no selection every method is that of the trainer beneath. Weight decay never reaches unselected
    scalars; by default (``off``) it does not act on single selected ones either, ``selected`` lets it pull
    them towards 0 and ``to_base`` towards the weights before training. Tensors that train whole decay as they
    do without a selection, but for selections that grow, which are defined without decay.

    Attributes:
        selection: The plan in force, or None.
    """

    selection: Selection | None = None
    _decay = "off"
    _age_correction = True
    _master_weights = True
    _for_checkpoint = False
    _growth: Growth | None = None
    _shrinking: Any = None  # a selector whose selection is still to shrink
    _shrunk = False

    def start_selection(self, selection: SelectionPlan | Selector | Select | None) -> None:
        """Put a selection into force; the model is loaded, and nothing has wrapped it yet.

        Args:
            selection: A plan, a selector that makes one, either with settings, or None for none.

        Raises:
            PlanError: The plan does not fit, differs between ranks, or cannot be enforced here.
        """
        if selection is None:
            return
        select = selection if isinstance(selection, Select) else Select(selection)
        weight_decay = select.weight_decay
        if weight_decay not in get_args(Decay):
            raise PlanError(f"weight_decay is off, selected or to_base, found {weight_decay!r}")
        kind = self.accelerator.distributed_type
        deepspeed = kind == DistributedType.DEEPSPEED
        fully = kind == DistributedType.FSDP  # the launcher's name for FSDP1 and FSDP2
        sharded = fully or (deepspeed and self.accelerator.state.deepspeed_plugin.zero_stage == 3)
        if weight_decay == "to_base" and deepspeed:
            raise PlanError(
                "weight_decay to_base acts before the step, which DeepSpeed hides: use selected or off"
            )
        model = self.accelerator.unwrap_model(self.model)
        growing = select.what if isinstance(select.what, GrowingSelector) else None
        try:
            plan, candidates, budget = self._made(select, model)
        except PlanError:
            raise
        except (ValueError, FloatingPointError) as error:  # an impossible budget, a broken weight
            raise PlanError(str(error)) from error
        if fully and not self.accelerator.is_fsdp2 and (plan.partial or candidates):
            raise PlanError(
                "single scalars cannot be trained under FSDP1, which flattens tensors together: use FSDP2 "
                "(fsdp_version: 2), DDP or DeepSpeed, or select whole tensors (hft, bitfit, explicit)"
            )
        backend = select.backend
        if getattr(select.what, "schedule", None) == "shrink":
            self._shrinking = select.what
            backend = self._shrinking_backend(backend, deepspeed=deepspeed, sharded=sharded)
        self._refuse_difference(plan)
        self._decay, self._age_correction = weight_decay, select.age_correction
        self._master_weights = select.master_weights
        self.selection = apply(
            model,
            plan,
            backend,
            candidates=candidates,
            shrinks=self._shrinking is not None,
            sharded=sharded,
            deepspeed=deepspeed,
        )
        if weight_decay == "to_base" and self.selection.backend not in ("packed", "composed"):
            raise PlanError(
                f"weight_decay to_base needs packed values, which remember where they began, found backend "
                f"{self.selection.backend!r}: use selected or off, or backend packed"
            )
        if growing is not None:
            self._growth = Growth(
                growing,
                self.selection,
                candidates,
                budget,
                broadcast=None if self.accelerator.num_processes == 1 else broadcast,
                first=self.accelerator.is_main_process,
            )
        if getattr(self.args, "gradient_checkpointing", False) and hasattr(
            model, "enable_input_require_grads"
        ):
            # a frozen embedding would cut the graph of re-entrant recomputation
            model.enable_input_require_grads()
        if self.selection.backend == "masked" and self._optim not in ADAMW:
            raise PlanError(
                f"backend 'masked' is an AdamW, found optim={self._optim}: set optim to adamw_torch, or "
                "backend to packed"
            )

    @property
    def selected_in_the_end(self) -> int | None:
        """Scalars that will train once a growing selection is complete; None for one that does not grow."""
        if self._growth is None or self.selection is None:
            return None
        return self.selection.start.count + self._growth.budget

    def selection_examples(self, count: int, groups: Sequence[str] = ()) -> Any:
        """Return batches of one row that a selector may score weights on, by name if groups are asked for.

        Raises:
            PlanError: This trainer's data are no examples with labels.
        """
        del count, groups
        raise PlanError(
            "the selector scores weights on examples with labels, and this trainer has none: make the plan "
            "with supervised data ('posttrain plan make'), and give its file to this run"
        )

    def end_selection(self) -> None:
        """Leave a plain model with the trained weights; training cannot go on after this."""
        if self.selection is not None:
            self.selection.refresh()
            self.selection.remove()
            self.selection = self._growth = None

    def plain_model(self) -> Any:
        """Return the model without wrappers, selection and sharding; training cannot go on after this."""
        sharded = self._skeleton is not None
        if not sharded:
            self.end_selection()
        model = super().plain_model()
        if sharded and self.selection is not None:
            for packed in list(packed_tensors(model)):
                packed.remove()
            self.selection = self._growth = None
        return model

    def _made(self, select: Select, model: Any) -> tuple[SelectionPlan, list[str], int]:
        """Return the plan to begin with, and of a growing selection the candidates and what is to come."""
        what = select.what
        if isinstance(what, SelectionPlan):
            return what, [], 0
        if isinstance(what, GrowingSelector):
            return self._begin(what, model, select.weight_decay)
        batches = select.batches
        if batches is None and what.needs == "examples":
            batches = self.selection_examples(select.examples, what.groups)
        return what.select(model, round=select.round, batches=batches), [], 0

    def _begin(
        self, selector: GrowingSelector, model: Any, weight_decay: str
    ) -> tuple[SelectionPlan, list[str], int]:
        if weight_decay != "off":
            raise PlanError(
                f"{selector.name} is defined without weight decay, found {weight_decay!r}: use off, "
                "or a selector whose selection stays"
            )
        if self.args.weight_decay:
            logger.warning(
                "weight_decay %s is not used: %s is defined without", self.args.weight_decay, selector.name
            )
        return selector.begin(model)

    def _shrinking_backend(self, backend: Backend, *, deepspeed: bool, sharded: bool) -> Backend:
        """Return the backend of a selection that shrinks in mid-run.

        Raises:
            PlanError: It cannot, in this setup.
        """
        name = self._shrinking.name
        if deepspeed or sharded:
            raise PlanError(
                f"{name} selects again in mid-run, when DeepSpeed and FSDP have fixed what trains: use one "
                "process or DDP, or a selector whose selection stays"
            )
        if self._optim not in ADAMW:
            raise PlanError(
                f"{name} takes the optimiser's state along when it shrinks, which is known for AdamW, found "
                f"optim={self._optim}: set optim to adamw_torch"
            )
        if backend == "composed":
            raise PlanError(f"{name} shrinks, and composed values cannot stay behind: use packed or masked")
        if self.accelerator.num_processes == 1 or backend == "freeze":  # which is refused later
            return backend
        if backend == "packed":
            raise PlanError(
                f"{name} shrinks in mid-run, and DDP has fixed the sizes of packed parameters: use backend "
                "masked, or one process"
            )
        return "masked"

    @property
    def _optim(self) -> str:
        return str(getattr(self.args.optim, "value", self.args.optim))

    def _refuse_difference(self, plan: SelectionPlan) -> None:
        if self.accelerator.num_processes == 1:
            return
        prints = gather_object([plan.fingerprint()])
        if len(set(prints)) > 1:
            raise PlanError(
                f"the ranks hold {len(set(prints))} different plans: give all of them one file, or the same "
                "seed and the same weights"
            )

    # ---- optimiser --------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return what decoupled weight decay acts on; packed values only where that is wanted."""
        names: list[str] = super().get_decay_parameter_names(model)
        if self._decay == "selected":
            return names
        return [name for name in names if not is_packed_name(name)]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser: ours where single scalars of dense gradients move, or for fp32 masters."""
        target: Any = self.model if model is None else model
        if self.optimizer is not None:
            return super().create_optimizer(model)
        masked = self.selection is not None and self.selection.backend == "masked"
        if not (masked or self._keeps_masters(target)) or self.selection is None:
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(target))
        scalars = self.selection.positions
        groups: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                off = self._growth is not None or (self._decay == "off" and parameter in scalars)
                decay = self.args.weight_decay if name in decayed and not off else 0.0
                groups.setdefault(decay, []).append(parameter)
        self.optimizer = SelectiveAdamW(
            [{"params": groups[decay], "weight_decay": decay} for decay in sorted(groups, reverse=True)],
            scalars,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            age_correction=self._age_correction,
        )
        return self.optimizer

    def _keeps_masters(self, model: Any) -> bool:
        """Whether weights that train whole get a copy in fp32; says so where they should and cannot."""
        half = sum(
            parameter.numel()
            for parameter in model.parameters()
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
        )
        if not half or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False  # those keep copies of their own
        if self.selection is not None and self._master_weights and self._optim in ADAMW:
            logger.info("%d scalars in half precision train on a copy in fp32", half)
            return True
        why, cure = f"optim={self._optim}", "optim: adamw_torch_fused"
        if self.selection is None:
            why, cure = "as in TRL", "ZeRO-2"
        elif not self._master_weights:
            why, cure = "master_weights is off", "master_weights: true"
        if self.args.learning_rate < SWALLOWED_BELOW:
            logger.warning(
                "%d scalars train in half precision without a copy in fp32 (%s): most steps of learning rate "
                "%g are smaller than half of a weight's last place, and lost. Use %s, or weights in float32",
                half,
                why,
                self.args.learning_rate,
                cure,
            )
        return False

    @property
    def _selective(self) -> SelectiveAdamW | None:
        """The optimiser, if it moves single scalars of dense parameters."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, SelectiveAdamW) else None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip by the norm of what can move; what cannot move is left as it is."""
        optimizer = self._selective
        if optimizer is None:
            return super()._clip_grad_norm(model)
        parts = self._moving_gradients(optimizer)
        norm = torch.nn.utils.get_total_norm(parts)
        scale = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for (gradient, index), part in zip(optimizer.gradients(), parts, strict=True):
            factor = scale.to(gradient.device, gradient.dtype)
            if index is None or not gradient.is_contiguous():
                gradient.mul_(factor)
            else:
                gradient.view(-1)[index] = part.mul_(factor)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        optimizer = self._selective
        if optimizer is not None and grad_norm is None:  # there is no clipping
            grad_norm = torch.nn.utils.get_total_norm(self._moving_gradients(optimizer))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _moving_gradients(self, optimizer: SelectiveAdamW) -> list[torch.Tensor]:
        """Return the gradients of what moves at this step, after releasing what is due; once per step."""
        self.accelerator.unscale_gradients()
        if self._growth is not None and self._will_step(optimizer):
            self._growth.release(optimizer, self.state.max_steps)
        return [
            gradient if index is None else gradient.reshape(-1).index_select(0, index)
            for gradient, index in optimizer.gradients()
        ]

    def _will_step(self, optimizer: SelectiveAdamW) -> bool:
        """Whether a loss scaler, if there is one, will let the optimiser step."""
        if self.accelerator.scaler is None:
            return True
        return all(bool(torch.isfinite(gradient).all()) for gradient, _ in optimizer.gradients())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step."""
        if self._shrinking is not None:
            self._shrink_when_due()
        if self.selection is not None and self.is_deepspeed_enabled:
            self.selection.refresh()  # DeepSpeed writes parameters behind the version counter
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self._decay == "to_base" and self.selection is not None and self.accelerator.sync_gradients:
            strength = self._get_learning_rate() * self.args.weight_decay
            for packed in self.selection.packed.values():
                pull_to_base(packed, strength)
        return loss

    def _shrink_when_due(self) -> None:
        selection = self.selection
        if selection is None or self.state.global_step < round(
            self._shrinking.reselect_at * self.state.max_steps
        ):
            return
        selection.refresh()
        plan = self._shrinking.reselect(selection.model, selection.plan)
        self._refuse_difference(plan)
        logger.info("%s goes on with %d of %d scalars", plan.method, plan.count, selection.plan.count)
        selection.shrink(plan, getattr(self.optimizer, "optimizer", self.optimizer))
        self._shrinking, self._shrunk = None, True

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the share of selected scalars that the type of the weights shows as changed."""
        changed = None if self.selection is None else self.selection.changed()
        if changed is not None:
            logs = {**logs, "selection/changed": changed}
        stepped = None if self._selective is None else self._selective.visible()
        if stepped is not None:
            logs = {**logs, "selection/changed_by_step": stepped}
        if self._growth is not None:
            logs = {**logs, "selection/released": self._growth.count}
        super().log(logs, *args, **kwargs)

    # ---- checkpoints ------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on, which plan is in force included."""
        state = super().extra_state()
        if self.selection is not None:
            state["selection"] = self.selection.start.fingerprint()
        if self._growth is not None:
            state["growth"] = self._growth.state()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            CheckpointError: The checkpoint was written with another selection.
        """
        saved, growth = state.pop("selection", None), state.pop("growth", None)
        own = None if self.selection is None else self.selection.start.fingerprint()
        grows = self._growth is not None and self._growth.fits(growth)
        if saved != own or grows != (growth is not None):
            raise CheckpointError(_OTHER_SELECTION)
        if self._growth is not None:
            optimizer = self._selective
            assert optimizer is not None
            self._growth.restore(growth, optimizer)
        super().load_extra_state(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / PLAN_FILE
        if self._shrinking is not None and self.selection is not None and path.is_file():
            try:
                self.selection.shrink(SelectionPlan.load(path))
            except PlanError as error:
                raise CheckpointError(_OTHER_SELECTION) from error
            self._shrinking, self._shrunk = None, True
        # after shrinking, which writes the values it has into the weights
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_values(Path(resume_from_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of keys that a checkpoint lacks, but for packed values, which are in a file of their own."""
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if not is_packed_name(key)]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_values(Path(str(self.state.best_model_checkpoint)))

    def _load_values(self, checkpoint: Path) -> None:
        """Read the packed values, which are finer than the weights of the checkpoint.

        Raises:
            CheckpointError: The checkpoint has none, or those of another selection.
        """
        if self.selection is None or not self.selection.packed or self.is_fsdp_enabled:
            return  # FSDP's own checkpoint has the values among the parameters
        path = checkpoint / VALUES_FILE
        saved = load_file(path) if path.is_file() else {}
        packed = self.selection.packed
        if self._shrunk:  # the best checkpoint may be one from before
            saved = {name: self._remaining(name, values) for name, values in saved.items() if name in packed}
        if {name: values.shape for name, values in saved.items()} != {
            name: one.values.shape for name, one in packed.items()
        }:
            raise CheckpointError(_OTHER_SELECTION)
        with torch.no_grad():
            for name, one in packed.items():
                one.values.copy_(saved[name])
        self.selection.refresh()

    def _remaining(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the values of what still moves of a tensor."""
        assert self.selection is not None
        start, now = (plan.tensors[name].flat() for plan in (self.selection.start, self.selection.plan))
        return values if len(values) != len(start) else values[torch.searchsorted(start, now)]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self._for_checkpoint = True
        try:
            return super()._save_checkpoint(*args, **kwargs)
        finally:
            self._for_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a plain model; a checkpoint also holds the packed values, in a file of their own."""
        folder = Path(str(output_dir or self.args.output_dir))
        if self._shrunk and self._for_checkpoint and self.selection is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.selection.plan.save(folder / PLAN_FILE)
        if self.selection is None or not self.selection.packed:
            super()._save(output_dir, state_dict)
            return
        whole: Any = self.selection.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, self.selection.plain(whole))
        if self._for_checkpoint:
            values = {
                name: whole.get(name + SUFFIX, one.values).detach().cpu().contiguous()
                for name, one in self.selection.packed.items()
            }
            save_file(values, folder / VALUES_FILE)
