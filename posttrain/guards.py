"""Stopping at the first number that is not finite, with the rows that caused it written down."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

logger = logging.getLogger(__name__)


# Keys of TRL's batches that hold token ids; position_ids, for one, end in the same letters.
_TOKEN_IDS = frozenset({"input_ids", "prompt_ids", "completion_ids"})


class FiniteGuard(Trainer):
    """Mixin that stops a run before a non-finite loss or gradient reaches the weights.

    transformers replaces a NaN loss by the average of earlier ones in its logs and goes on with broken
    weights. Here the run stops; the last checkpoint is untouched and the micro-batch is in
    ``nonfinite.json`` in the output folder.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does.

        Raises:
            FloatingPointError: It is not finite; the rows are written down first.
        """
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self._refuse_nonfinite(result[0] if isinstance(result, tuple) else result, inputs)
        return result

    def _refuse_nonfinite(self, loss: torch.Tensor, inputs: dict[str, Any]) -> None:
        if not torch.isfinite(loss.detach()).all():
            path = self._write_rows(inputs)
            raise FloatingPointError(
                f"the loss is {loss.detach().float().mean().item()} after {self.state.global_step} optimiser "
                f"steps; the rows are in {path}. Usual causes: a learning rate that is too high, a broken "
                "checkpoint, float16 overflow, or a reward or reference that is not finite."
            )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # with a loss scaler infinite gradients are its daily work: it skips the step by itself
        scaling = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaling and not math.isfinite(float(norm)):
            raise FloatingPointError(
                f"the gradient norm is {float(norm)} after {self.state.global_step} optimiser steps, with a "
                "finite loss; nothing was updated. Lower the learning rate, or train in bfloat16 or float32."
            )
        return norm

    def _write_rows(self, inputs: dict[str, Any]) -> Path:
        """Write the tensors of a micro-batch as JSON, decoded where they are token ids."""
        rows: dict[str, Any] = {}
        tokenizer: Any = getattr(self, "_tokenizer", None) or self.processing_class
        for key, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.numel() > 1_000_000:
                continue
            rows[key] = value.detach().float().tolist() if value.is_floating_point() else value.tolist()
            if key in _TOKEN_IDS and hasattr(tokenizer, "batch_decode"):
                rows[f"{key}_text"] = tokenizer.batch_decode(value)
        folder = Path(self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "" if self.args.world_size <= 1 else f"_rank{self.args.process_index}"
        path = folder / f"nonfinite{suffix}.json"
        path.write_text(json.dumps({"step": self.state.global_step, "rows": rows}))
        return path
