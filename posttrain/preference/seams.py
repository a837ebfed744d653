"""Where ours meets ``trl.DPOTrainer``: the one place that knows how its loss is put together.

TRL's ``_compute_loss`` runs as it is, with every ``loss_type``, f-divergence, weight and metric. Two things
differ: the reference forward is ours, so that it can be watched, and its sums reach TRL by the way of
precomputed ones. With the correction c = S - sum_t rho_t subtracted from these sums, the log-ratio that TRL
forms is the score S of :mod:`posttrain.preference.method`, gradient included.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOTrainer as TRLDPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from posttrain.adapters.reference import REFERENCE, InitialPolicy
from posttrain.columns import ID
from posttrain.preference.kl import forward_with_kl


class PairSeams(InitialPolicy, TRLDPOTrainer):
    """TRL's trainer with hooks; with the hooks' defaults it is TRL, bit for bit, but for wrong references."""

    # outputs of the reference's latest forward, while several passes over one batch share them
    _reference_outputs: list[Any] | None = None

    _shared = 0  # data sets written for other ranks

    @property
    def wants_kl(self) -> bool:
        """Whether the outputs that :meth:`on_forward` gets have ``kl``."""
        return False

    def on_forward(
        self, outputs: Any, logps: torch.Tensor, ref_logps: torch.Tensor | None, ref_sums: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the (2B,) correction of the log-ratios, with gradient, or None for none.

        Args:
            outputs: Of the policy's forward.
            logps: (2B, T) of the policy, 0 where nothing counts.
            ref_logps: The same of the reference, None when its sums were precomputed.
            ref_sums: (2B,).
        """
        del outputs, logps, ref_logps, ref_sums
        return None

    def on_reference(self, reference: torch.nn.Module) -> AbstractContextManager[Any]:
        """Return a context for the reference's forward."""
        del reference
        return contextlib.nullcontext()

    def on_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of the micro-batch, given TRL's."""
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        precomputed = self.precompute_ref_logps
        inputs = dict(inputs)
        self.mask = inputs["completion_mask"][..., 1:]
        self.tokens = inputs["input_ids"][..., 1:]
        self.lengths = inputs["completion_mask"].sum(dim=1)
        self.ids = inputs.pop(ID, None)

        def policy(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):  # logits for compute_metrics
                return model(**kwargs)
            outputs = self._forward_with_kl(model, kwargs, inputs) if self.wants_kl else model(**kwargs)
            width = self.mask.size(1)
            ref_logps = None
            if precomputed:
                ref_sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            else:
                ref_logps = (
                    outputs.ref_logps
                    if self.wants_kl
                    else self._reference_forward(kwargs).log_probs[:, -width:]
                )
                ref_sums = self.weighed_sums(ref_logps)
            logps = outputs.log_probs[:, -width:]
            self.check_start(self.weighed_sums(logps) - ref_sums, self.mask)
            correction = self.on_forward(outputs, logps, ref_logps, ref_sums)
            if correction is not None:
                ref_sums = ref_sums - correction
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_sums.chunk(2)
            return outputs

        self.precompute_ref_logps = True
        try:
            result = super()._compute_loss(policy, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        if return_outputs:
            loss, outputs = result
            return self.on_loss(loss), outputs
        return self.on_loss(result)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the reference's sums; other ranks read them in a file beside that of the rows."""
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            dataset = self._written(dataset)  # rows in memory have no place that all ranks know
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def _written(self, dataset: Dataset) -> Dataset:
        folder = Path(self.args.output_dir or ".") / "_precomputed" / str(self._shared)
        self._shared += 1
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            dataset.save_to_disk(folder)
        self.accelerator.wait_for_everyone()
        return Dataset.load_from_disk(folder)

    def _forward_with_kl(self, model: Any, kwargs: dict[str, Any], inputs: dict[str, Any]) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        return forward_with_kl(
            model,
            policy.get_base_model() if isinstance(policy, PeftModel) else policy,
            self._reference_forward,
            kwargs,
            inputs["completion_mask"].bool(),
            self.accelerator.autocast(),
            log_sum_sq_probs=self.use_weighting,
        )

    def _reference_forward(
        self,
        kwargs: dict[str, Any],
        watch: Callable[[Any], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext(),
    ) -> Any:
        """Run the reference on what the policy was given, in the context that ``watch`` makes."""
        if self._reference_outputs:
            return self._reference_outputs[0]
        policy: Any = self.model
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        # a frozen model has no use for router logits
        kwargs = {name: value for name, value in kwargs.items() if name != "output_router_logits"}
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(policy, checkpointing),
            self._reference() as (reference, unwrapped),
            self.on_reference(unwrapped),
            watch(unwrapped),
        ):
            outputs = reference(**kwargs)
        if self._reference_outputs is not None:
            self._reference_outputs.append(outputs)
        return outputs

    @contextlib.contextmanager
    def one_reference(self) -> Iterator[None]:
        """Run the reference once for all passes within, which are over one batch."""
        self._reference_outputs = []
        try:
            yield
        finally:
            self._reference_outputs = None

    @contextlib.contextmanager
    def _reference(self) -> Iterator[tuple[Any, torch.nn.Module]]:
        """Give the reference as it is called, and without wrappers and adapters' shells."""
        if self.ref_model is not None:
            yield self.ref_model, self.accelerator.unwrap_model(self.ref_model)
            return
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, PeftModel)  # else TRL has made a reference model
        with use_adapter(policy, adapter_name=REFERENCE if REFERENCE in policy.peft_config else None):
            yield self.model, policy.get_base_model()

    def weighed_sums(self, logps: torch.Tensor) -> torch.Tensor:
        """Return (2B,) sums over completions, as TRL forms them: ``ld_alpha`` weighs the longer tail."""
        if self.ld_alpha is None:
            return logps.sum(dim=1)
        place = self.mask.cumsum(dim=1)
        chosen, rejected = self.mask.sum(dim=1).long().chunk(2)
        shared = torch.minimum(chosen, rejected).repeat(2).unsqueeze(1)
        head = (logps * ((place > 0) & (place <= shared))).sum(dim=1)
        return head + self.ld_alpha * (logps * (place > shared)).sum(dim=1)
