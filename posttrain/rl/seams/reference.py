"""The initial policy as a reference: made where TRL has none, moved, saved, asked for log-probabilities."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import (
    add_fused_lm_head,
    disable_dropout_in_model,
    use_adapter,
)

from posttrain.adapters.reference import (
    REFERENCE,
    adapter_pairs,
    hides_start,
    keep_initial,
    load_beside_reference,
)
from posttrain.partitioned import is_partitioned
from posttrain.rl.seams.server import ServerSeams
from posttrain.sharding import gathered, is_split, rows_here

# What a forward needs beside ids and mask; present for multimodal models only.
_FORWARD_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class ReferenceSeams(ServerSeams):
    """Keeps a reference policy beside TRL's own."""

    #: Whether :meth:`refresh_reference` may be called.
    wants_movable_reference: bool = False
    #: Whether ``posttrain/old_logps`` must be in every on-policy batch.
    wants_old_logps: bool = False
    _own_reference: Any = None
    _reference_moved: bool = False

    def _build_reference(self) -> None:
        """Make the initial policy available where TRL does not: with ``beta=0``, or hidden in an adapter."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            if REFERENCE in policy.peft_config or self.wants_movable_reference or hides_start(policy):
                keep_initial(policy)
            return
        if self.beta != 0.0:
            return
        reference = _partitioned_copy(policy) if is_partitioned(policy) else copy.deepcopy(policy)
        reference.__dict__.pop("forward", None)  # TRL's patched forward belongs to the policy
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        reference.requires_grad_(False).eval()
        add_fused_lm_head(
            reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32
        )
        if self.is_deepspeed_enabled:
            self._own_reference = prepare_deepspeed(reference, self.accelerator)
        elif self.is_fsdp_enabled:
            self._own_reference = prepare_fsdp(reference, self.accelerator)
        else:
            self._own_reference = self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # whose own checkpoint has been loaded
            load_beside_reference(self.model if model is None else model, resume_from_checkpoint)

    @contextlib.contextmanager
    def _reference_model(self) -> Iterator[torch.nn.Module]:
        reference = self._own_reference if self._own_reference is not None else self.ref_model
        if reference is not None:
            yield reference
            return
        policy = self.accelerator.unwrap_model(self.model)
        training = policy.training
        policy.eval()  # dropout belongs to training: the reference is one fixed policy
        try:
            with use_adapter(policy, adapter_name=REFERENCE if REFERENCE in policy.peft_config else None):
                yield self.model
        finally:
            policy.train(training)

    def _refuse_sharded_reference(self) -> None:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "the reference cannot be moved while DeepSpeed ZeRO-3 shards it: use FSDP2, ZeRO-2 or plain "
                "data parallelism, with an adapter if memory is short"
            )

    def _reference_tensors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors in which reference and policy can differ, in pairs."""
        policy = self.accelerator.unwrap_model(self.model)
        if isinstance(policy, PeftModel):
            return adapter_pairs(policy, policy.active_adapters[0])
        reference = self._own_reference if self._own_reference is not None else self.ref_model
        return list(zip(reference.parameters(), policy.parameters(), strict=True))

    def refresh_reference(self) -> None:
        """Make the current policy the reference, of the adapter or of all weights."""
        for reference, policy in self._reference_tensors():
            rows_here(reference.data)[0].copy_(rows_here(policy.data)[0])  # FSDP2 splits both in the same way
        self._reference_moved = True

    def reference_state(self) -> dict[str, Any]:
        """Return whether the reference moved and, on the main process, its tensors then. Collective."""
        pairs = self._reference_tensors() if self._reference_moved else []
        tensors = [
            whole.cpu()
            for whole in (gathered(tensor) for tensor, _ in pairs)
            if self.accelerator.is_main_process
        ]
        return {"moved": self._reference_moved, "tensors": tensors}

    def load_reference_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`reference_state` returned. Collective."""
        self._reference_moved = state["moved"]
        if not self._reference_moved:
            return
        references = [reference for reference, _ in self._reference_tensors()]
        main = self.accelerator.is_main_process
        for place, reference in enumerate(references):
            rows, first = rows_here(reference.data)
            whole = torch.empty(reference.shape, dtype=reference.dtype, device=rows.device)
            if main:
                whole.copy_(state["tensors"][place])
            broadcast(whole)
            rows.copy_(whole[first:][: len(rows)] if is_split(reference) else whole)

    def _embedded(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return each row's mean final hidden state, and the old log-probs of that forward if wanted."""
        mask = self.loss_mask(batch)
        parts: list[torch.Tensor] = []
        policy: Any = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy

        def pool(module: torch.nn.Module, args: Any, output: Any) -> None:
            del module, args
            done = sum(len(part) for part in parts)
            hidden = output.last_hidden_state[:, -mask.size(1) :].float()
            rows = mask[done : done + len(hidden)].unsqueeze(2)
            # a product would let a NaN of a padded position through
            parts.append(hidden.masked_fill(rows == 0, 0.0).sum(dim=1) / rows.sum(dim=1).clamp(min=1))

        handle = policy.base_model.register_forward_hook(pool)
        try:
            logps = self._logps_of_batch(self.model, batch, self._rows_per_forward)
        finally:
            handle.remove()
        found = {"posttrain/embeddings": torch.cat(parts)}
        if self.wants_old_logps and "old_per_token_logps" not in batch:
            found["posttrain/old_logps"] = logps
        return found

    def _reference_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, C) log-probabilities of a generation batch under the initial policy."""
        rows = self._rows_per_forward  # the reference is in evaluation mode, the run may be in training
        with self._reference_model() as reference:
            return self._logps_of_batch(reference, batch, rows)

    @property
    def _rows_per_forward(self) -> int:
        training = self.mode == "train"
        return self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

    def _logps_of_batch(self, model: torch.nn.Module, batch: dict[str, Any], rows: int) -> torch.Tensor:
        """(B, C) log-probabilities of a generation batch under ``model``, ``rows`` at a time, no gradient."""
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=rows,
                **{key: batch[key] for key in _FORWARD_KEYS if key in batch},
            )
        return logps


def _partitioned_copy(model: Any) -> Any:
    """Return a copy of a model that ZeRO-3 has cut up; every rank copies its own pieces.

    Not the checkpoint again: a model that was warm-started is no longer what its path says.
    """
    copied = type(model)._from_config(model.config, dtype=model.dtype)
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
            ours.ds_tensor.copy_(theirs.ds_tensor)
        for ours, theirs in zip(copied.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return copied
