"""Answers that no pair speaks about, scored during training: where does the probability go?

``DPOTrainer(probe_dataset=rows)`` takes rows of ``prompt`` and ``completion``, text or messages, that are in
no pair. At each evaluation, or at each log of a run without evaluations, policy and reference score them, and
``probe/logps_shift``, ``probe/kl_forward`` and ``probe/entropy`` of :mod:`posttrain.preference.diagnostics`
are logged, exact over ranks. That costs two forwards of the probe and no gradient. In a full fine-tuning with
``precompute_ref_log_probs`` no reference stays in memory: its sums are computed once at the start, and
``kl_forward`` is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain.kernels import Scored, watch_head
from posttrain.preference import diagnostics
from posttrain.preference.kl import forward_with_kl, one_logit
from posttrain.preference.seams import PairSeams
from posttrain.rl.gauges import Gauges


class Probing(PairSeams):
    """Adds to each log what has changed since the one before, and what the probe says."""

    args: Any
    _probe: Dataset | None = None
    _probed_at = -1

    def start_probe(self, dataset: Any) -> None:
        """Prepare the rows as TRL prepares pairs; nothing without them.

        Raises:
            ValueError: Columns are missing, the data is no map-style data set, or no row is left.
        """
        if dataset is None:
            return
        if self._is_vision_dataset:
            raise ValueError("a probe is text, and the training rows have images: drop probe_dataset")
        found = getattr(dataset, "column_names", None) or []
        if not isinstance(dataset, Dataset) or not {"prompt", "completion"} <= set(found):
            raise ValueError(
                "probe_dataset needs a datasets.Dataset with the columns prompt and completion, found "
                f"{type(dataset).__name__} with {', '.join(map(str, found)) or 'no columns'}"
            )
        rows = dataset.select_columns(["prompt", "completion"]).rename_column("completion", "chosen")
        rows = rows.map(lambda row: {"rejected": row["chosen"]})
        tokenizer: Any = self.processing_class
        rows = self._prepare_dataset(rows, tokenizer, self.args, "probe")
        if len(rows) == 0:
            raise ValueError(
                f"all {len(dataset)} prompts of probe_dataset fill max_length={self.args.max_length}: "
                "raise it"
            )
        if not self._reference_in_memory:
            rows = self._precompute_ref_logps(rows, "probe", self.args.per_device_eval_batch_size)
        self._probe = rows

    @property
    def _reference_in_memory(self) -> bool:
        return self.ref_model is not None or isinstance(self.accelerator.unwrap_model(self.model), PeftModel)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the trends of :mod:`posttrain.preference.diagnostics` and the probe where it is due."""
        policy: Any = self.model
        mode, prefix = ("train", "") if policy.training else ("eval", "eval_")
        now = {prefix + name: sum(values) / len(values) for name, values in self._metrics[mode].items()}
        step = self.state.global_step
        earlier: Any = diagnostics.same_kind(self.state.log_history, logs)
        logs.update(diagnostics.trends(now, earlier, step, prefix))
        if self._probe is not None and step != self._probed_at and self._due(logs):
            self._probed_at = step
            logs.update(self.measure_probe(self._probe))
        super().log(logs, start_time)

    def _due(self, logs: Mapping[str, float]) -> bool:
        if any(name.startswith("eval_") and name.endswith("_loss") for name in logs):
            return True
        return "loss" in logs and self.args.eval_strategy == "no"

    @torch.no_grad()
    def measure_probe(self, rows: Dataset) -> dict[str, float]:
        """Return the numbers of the probe; every rank has to call it.

        Args:
            rows: Prepared rows, all of them on every rank.
        """
        policy: Any = self.model
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        size = self.args.per_device_eval_batch_size
        mine = list(range(rank, len(rows), ranks))
        collate = DataCollatorForPreference(
            self._tokenizer.pad_token_id,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )
        shifts, kls, entropies = [], [], []
        training = policy.training
        policy.eval()
        try:
            # sharded models need every rank in every forward: who has run out takes a row that does not count
            for start in range(0, math.ceil(len(rows) / ranks), size):
                places = mine[start : start + size]
                batch = collate([dict(rows[place]) for place in places or [0]])
                # the collator's second half are the rejected rows, which repeat the first
                half = {
                    name: value.chunk(2)[0].to(self.args.device)
                    for name, value in batch.items()
                    if value.dim() == 2
                }
                logps, ref_sums, kl, entropy, where = self._score_probe(half, batch)
                if places:
                    shifts.append(logps.sum(dim=1) - ref_sums)
                    entropies.append(entropy[where])
                    kls += [] if kl is None else [kl[where]]
        finally:
            policy.train(training)
        gauges, empty = Gauges(), torch.zeros(0, device=self.args.device)
        gauges.enter("probe")
        gauges.mean("logps_shift", torch.cat([empty, *shifts]))
        gauges.mean("entropy", torch.cat([empty, *entropies]))
        if self._reference_in_memory:
            gauges.mean("kl_forward", torch.cat([empty, *kls]))
        means, _ = gauges.flush(self.accelerator)
        return means

    def _score_probe(
        self, half: dict[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return log-probabilities (R, T), the reference's sums (R,), KL, entropies and mask (R, T)."""
        model: Any = self.accelerator.unwrap_model(self.model)
        inside = model.get_base_model() if isinstance(model, PeftModel) else model
        mask = half.pop("completion_mask").bool()
        kwargs = {**half, "use_cache": False}
        run: Any = self.model
        if self._reference_in_memory:
            out = forward_with_kl(
                run, inside, self._probe_reference, kwargs, mask, self.accelerator.autocast()
            )
            assert out.log_probs is not None
            assert out.ref_logps is not None
            assert out.entropy is not None
            return out.log_probs, out.ref_logps.sum(dim=1), out.kl, out.entropy, mask[:, 1:]
        seen: list[Scored] = []
        with watch_head(inside, half["input_ids"], mask, mask.size(1) - 1, seen.append):
            run(**kwargs, **one_logit(inside))
        (scored,) = seen
        found = scored.statistics(scored.mask, entropy=True)
        assert found.entropies is not None
        logps, entropy = (
            values.new_zeros(scored.mask.shape).masked_scatter(scored.mask, values)
            for values in (found.logps, found.entropies)
        )
        return logps, batch["ref_chosen_logps"].to(logps.device), None, entropy, scored.mask

    def _probe_reference(self, kwargs: dict[str, Any], watch: Any) -> Any:
        """Run the reference, unseen by methods."""
        with self._reference() as (reference, inside), watch(inside):
            return reference(**kwargs)
