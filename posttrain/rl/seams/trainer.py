"""The hooks: where TRL generates, scores, and computes its loss."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler, get_callable_name, get_config_model_id

from posttrain.adapters.reference import copied_safely
from posttrain.kernels.head import Scored, watch_head
from posttrain.kernels.kept import Truncation
from posttrain.rl.formulas import aggregate, group_advantages
from posttrain.rl.seams.reference import ReferenceSeams
from posttrain.rollout.truncation import reshapes
from posttrain.rollout.verify import default_limit, gap_of, refuse_gap
from posttrain.watchdog.phases import phase

logger = logging.getLogger(__name__)

# A batch whose log-probabilities are NaN until GRPOSeams.scored.
_POSTPONED = "posttrain/postponed"
# (B, C) log of the mass that truncated sampling kept, in the old log-prob pass.
_KEPT = "posttrain/log_kept"


def reward_name(function: Any) -> str:
    """Return the name TRL gives to a reward function, a reward model or the path of one."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        config: Any = function.config
        return str(get_config_model_id(config).split("/")[-1])
    return str(get_callable_name(function))


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler whose order depends on (seed, epoch) alone, so that a resumed run sees the same rows.

    An uninterrupted run gets the order of ``RepeatSampler``; upstream restarts at the first epoch's order
    after a resume, because its generator is not saved.
    """

    def set_epoch(self, epoch: int) -> None:
        """Put the generator where it stands at the start of ``epoch`` (0-based)."""
        if self.shuffle:
            assert self.seed is not None  # TRL passes args.seed
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class GRPOSeams(ReferenceSeams):
    """TRL's trainer with hooks; with :attr:`hooked` False it is TRL, bit for bit."""

    #: Set by the subclass before ``super().__init__``: whether the hooks are called at all.
    hooked: bool = False
    #: Whether ``ref_per_token_logps`` must be in every batch, also with ``beta=0``.
    wants_reference: bool = False
    #: Whether ``posttrain/embeddings`` must be in every batch.
    wants_embeddings: bool = False
    #: Whether :attr:`live_head` must be there in the loss.
    wants_head: bool = False
    #: The same for the policy that generated: off-policy :meth:`on_old_head` is called in its log-prob pass.
    wants_old_head: bool = False
    #: How sampling is cut, or None; see :mod:`posttrain.rollout.truncation`.
    truncation: Truncation | None = None
    #: Whether the loss is that of the cut distribution.
    corrects_truncation: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._open_batch: dict[str, Any] | None = None
        self._gathered_rewards: torch.Tensor | None = None
        self._old_pass_is_next = self._postponing = False
        self._scores_old_head = self._measures_kept = False
        self._checked_syncs = 0
        self._moved: dict[str, torch.Tensor] = {}
        self._old_statistics: dict[str, torch.Tensor] = {}
        self.live_head: Scored | None = None
        with copied_safely(args[0] if args else kwargs.get("model")), self.engine_arguments():
            super().__init__(*args, **kwargs)
        self.start_sync()
        if self.wants_reference or self.wants_movable_reference or self.beta != 0.0:
            self._build_reference()
        if self.wants_movable_reference:
            self._refuse_sharded_reference()

    # ---- hooks ------------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Act on the policy or the reference, in training, while no rollout is in use."""

    def on_sampled(self, batch: dict[str, Any]) -> None:
        """Look at a generation batch as TRL made it, log-probabilities of the sampler included if given."""

    def on_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Reshape the gathered (rows of all ranks, functions) rewards."""
        return rewards

    def on_generated(self, inputs: Any, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Replace or add rows of a generation batch; around :meth:`on_rollout`."""
        del inputs
        return self.on_rollout(self.scored(batch), rewards)

    def on_rollout(self, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Change a generation batch; ``rewards`` is the gathered matrix."""
        del rewards
        return batch

    def on_tokens(self, batch: dict[str, Any], logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Return the advantages of a micro-batch, given its live statistics."""
        del logps, entropies
        return batch["advantages"]

    def on_old_head(self, scored: Scored) -> dict[str, torch.Tensor]:
        """Return (rows, C) tensors for the batch, from the LM head of the policy that generated."""
        del scored
        return {}

    def on_micro_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Return the rows of a micro-batch that the loss sees, and the factor that keeps its divisor."""
        return batch, 1.0

    def on_loss(self, loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Add to the loss of a micro-batch."""
        del batch
        return loss

    # ---- seams ------------------------------------------------------------------------------------------

    def _generate(self, prompts: Any) -> Any:
        with phase("generation"):
            return super()._generate(prompts)

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        with phase("rewards"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = (completions, completion_ids_list, prompts)
        self._gathered_rewards = self.on_rewards(rewards)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.hooked and self.mode == "train":
            self.before_generation()
        batch = self.raw_rollout(inputs)
        self.check_sync(batch)
        self.on_sampled(batch)
        if self.hooked:
            assert self._gathered_rewards is not None
            batch = self.on_generated(inputs, batch, self._gathered_rewards)
        return batch

    def raw_rollout(self, inputs: Any) -> dict[str, Any]:
        """Generate and verify ``inputs`` as TRL does; :meth:`scored` is still to come. Collective."""
        # the correction for the sampler and methods that look at the old head need TRL's pass where it is
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        self._scores_old_head, self._measures_kept = (
            self.wants_old_head and self.off_policy,
            corrected and self.truncation is not None,
        )
        self._old_pass_is_next, self._old_statistics = self._scores_old_head or self._measures_kept, {}
        self._postponing = self.rows_may_go and not corrected and not self._old_pass_is_next
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            postponed, self._postponing = self._postponing, False
        kept = self._old_statistics.pop(_KEPT, None)
        batch.update(self._old_statistics)
        if kept is not None:
            # TRL has made its ratio of what the sampler drew from; from here on everything is of the policy
            batch["old_per_token_logps"] = batch["old_per_token_logps"] + kept
            batch["sampling_per_token_logps"] = batch["sampling_per_token_logps"] + kept
        if postponed:
            batch[_POSTPONED] = True
        return batch

    def check_sync(self, batch: dict[str, Any]) -> None:
        """Compare sampler and trainer after each of the first syncs, see :mod:`posttrain.rollout.verify`.

        Raises:
            RolloutError: The engine does not sample from the trainer's weights. On every rank.
        """
        sync, settings = self.weight_sync, self.rollout_settings
        if sync is None or self._checked_syncs == sync.count or sync.count > settings.probe_syncs:
            return
        self._checked_syncs = sync.count
        if self.rollout_func is not None or reshapes(vars(self.args)):
            if sync.count == 1:
                logger.warning("what vLLM samples cannot be compared with the trainer's log-probabilities")
            return
        if self.vllm_importance_sampling_correction:
            own = batch["old_per_token_logps"]
        else:
            self._measures_kept = self._old_pass_is_next = self.truncation is not None
            self._scores_old_head = False
            own = self._logps_of_batch(self.model, batch, self._rows_per_forward)
            self._old_statistics.pop(_KEPT, None)
        gap = gap_of(own, batch["sampling_per_token_logps"], self.loss_mask(batch))
        device = self.accelerator.device
        all_gaps = torch.tensor([[gap.total, gap.tokens, gap.worst]], dtype=torch.float64, device=device)
        total, tokens, worst = self.accelerator.gather(all_gaps).unbind(dim=1)
        if tokens.sum() == 0:
            return
        rank = int(torch.where(worst.isnan(), torch.inf, worst).argmax())
        where = f"{worst[rank].item():.3g} nats"
        if rank == self.accelerator.process_index:
            token = int(batch["completion_ids"][gap.row, gap.column])
            where += f" at token {gap.column} ({token}, {self._tokenizer.decode([token])!r}) of row {gap.row}"
        dtype = sync.stream.dtype or torch.float32
        tied = getattr(self.accelerator.unwrap_model(self.model).config, "tie_word_embeddings", False)
        refuse_gap(
            float(total.sum() / tokens.sum()),
            settings.probe_limit or default_limit(dtype, device.type),
            sync=sync.count,
            sent=f"{sync.share:.0%} of the weights",
            worst=f"{where} on rank {rank}",
            dtype=dtype,
            remedies="tie_word_embeddings: false in the model, whose head is tied; " if tied else "",
        )

    @property
    def rows_may_go(self) -> bool:
        """Whether rows can be thrown away between :meth:`raw_rollout` and :meth:`scored`.

        TRL's own passes over the batch then wait for the rows that stay.
        """
        return False

    def scored(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of :meth:`raw_rollout` with the log-probabilities that are missing. Collective."""
        batch = dict(batch)
        if batch.pop(_POSTPONED, False):
            if "old_per_token_logps" in batch:
                batch["old_per_token_logps"] = self._logps_of_batch(self.model, batch, self._rows_per_forward)
            if "ref_per_token_logps" in batch:
                batch["ref_per_token_logps"] = self._reference_logps(batch)
        if self.wants_embeddings:
            batch.update(self._embedded(batch))
        elif self.wants_old_logps and "old_per_token_logps" not in batch:
            # under another name, so that TRL's own loss stays strictly on-policy
            batch["posttrain/old_logps"] = self._logps_of_batch(self.model, batch, self._rows_per_forward)
        if self.wants_reference and "ref_per_token_logps" not in batch:
            batch["ref_per_token_logps"] = self._reference_logps(batch)
        return batch

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._postponing:
            ids, columns = args[0], args[2]
            return torch.full((len(ids), columns), torch.nan, device=ids.device), None, None
        is_old_pass = self._old_pass_is_next
        # in the loss it is part of the forward
        where = contextlib.nullcontext() if torch.is_grad_enabled() else phase("log_probs")
        with where, self._watching(model, *args[:3]):
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._open_batch is not None:
            logps, entropies, _ = result
            if self.hooked:
                self._open_batch["advantages"] = self.on_tokens(self._open_batch, logps, entropies)
            if self.corrects_truncation:
                return self._renormalised(self._open_batch, logps), *result[1:]
        elif is_old_pass and _KEPT in self._old_statistics:
            return result[0] - self._old_statistics[_KEPT], *result[1:]
        return result

    def _renormalised(self, batch: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
        """Return (B, C) log-probabilities over the kept tokens, and move what TRL compares them with."""
        if self.live_head is None:
            raise RuntimeError(
                "truncated sampling cannot be corrected: the forward does not show what goes into the LM "
                "head. Leave top_p, top_k and min_p out, or set rollout.truncated_sampling: accept"
            )
        assert self.truncation is not None
        log_kept = self.live_head.log_kept(self.truncation).to(logps)
        compared = ("old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")
        self._moved = {name: batch[name] for name in compared if name in batch}
        for name, values in self._moved.items():
            # on-policy the kept set and its mass are those of the policy that sampled; of the reference with
            # gradient, so that the difference, and with it the KL term, stays that of the whole distribution
            batch[name] = values - (log_kept if name == "ref_per_token_logps" else log_kept.detach())
        return logps - log_kept

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.hooked and not self.corrects_truncation:
            return super()._compute_loss(model, inputs)
        # a copy: buffered rollouts are used again in later iterations
        self._open_batch, share = self.on_micro_batch(dict(inputs)) if self.hooked else (dict(inputs), 1.0)
        try:
            loss = super()._compute_loss(model, self._open_batch)
            self._open_batch.update(self._moved)
            if self.hooked:
                loss = self.on_loss(loss, self._open_batch)
            return loss if isinstance(share, float) and share == 1.0 else loss * share
        finally:
            self._open_batch = self.live_head = None
            self._moved = {}

    @contextlib.contextmanager
    def _watching(
        self, model: Any, input_ids: torch.Tensor, mask: torch.Tensor, columns: int
    ) -> Iterator[None]:
        """Pick up what goes into the LM head in the loss and in the old log-prob pass, if somebody asked."""
        in_loss = self._open_batch is not None
        wanted = self.wants_head or (self.wants_old_head and not self.off_policy) or self.corrects_truncation
        if not (wanted if in_loss else self._old_pass_is_next):
            yield
            return
        self._old_pass_is_next = False
        seen: list[Scored] = []
        parts: list[dict[str, torch.Tensor]] = []
        policy = self.accelerator.unwrap_model(model)
        policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy

        def receive(scored: Scored) -> None:
            if in_loss:
                seen.append(scored)
            else:
                # at once, so that the hidden states of a whole generation batch are never held
                part = self.on_old_head(scored) if self._scores_old_head else {}
                if self._measures_kept:
                    assert self.truncation is not None
                    part = {**part, _KEPT: scored.log_kept(self.truncation)}
                parts.append(part)

        with watch_head(policy, input_ids, mask, columns, receive, temperature=self.temperature):
            yield
        if in_loss:
            # none where something stands in for the forward: who cannot do without says so
            assert len(seen) <= 1
            self.live_head = seen[0] if seen else None
        else:
            self._old_statistics = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        upstream: Any = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            data_source=upstream.data_source,
            mini_repeat_count=upstream.mini_repeat_count,
            batch_size=upstream.batch_size,
            repeat_count=upstream.repeat_count,
            shuffle=upstream.shuffle,
            seed=upstream.seed,
        )

    # ---- what the seams give ----------------------------------------------------------------------------

    def aggregate(self, values: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Reduce a (B, C) term with the divisor this run's loss uses for ``batch``."""
        items = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.mode == "train":
            items = items * self.accumulation / self.args.steps_per_generation
        return aggregate(
            values,
            self.loss_mask(batch),
            self.loss_type,
            accumulation=self.accumulation,
            max_completion_length=self.max_completion_length,
            items=items,
        )

    def kl_term(self, batch: dict[str, Any], logps: torch.Tensor) -> torch.Tensor:
        """(B, C), what TRL adds to its per-token loss for ``beta``, with gradient through ``logps``."""
        difference = batch["ref_per_token_logps"] - logps
        estimate = difference.exp() - difference - 1
        if self.args.use_bias_correction_kl:
            log_ratio = logps - batch.get("old_per_token_logps", logps.detach())
            if self.importance_sampling_level == "sequence":
                mask = self.loss_mask(batch)
                tokens = mask.sum(-1, keepdim=True).clamp(min=1.0)
                log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / tokens
            estimate = estimate * log_ratio.exp()
        return self.beta * estimate

    def unclip_term(self, batch: dict[str, Any], logps: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(B, C), what turns TRL's clipped policy term into -A r at the tokens ``where``, (B, C) bool.

        For negative advantages below ``1 - epsilon``; elsewhere it is 0. With gradient through ``logps``.
        """
        advantages = batch["advantages"]
        columns = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        ratio = (logps - batch.get("old_per_token_logps", logps.detach())).exp()
        cut = where & (columns < 0)
        term = torch.where(cut, -columns * (ratio - (1 - self.epsilon_low)).clamp(max=0), 0.0)
        return term * batch["importance_sampling_ratio"] if "importance_sampling_ratio" in batch else term

    @property
    def accumulation(self) -> float:
        """Micro-steps of the current optimiser step, the divisor of every mean; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self.mode == "train" else 1.0

    def advantages_of(self, rewards: torch.Tensor, group_size: int) -> torch.Tensor:
        """Return the advantages of a gathered (rows, functions) matrix under this run's settings."""
        return group_advantages(
            rewards,
            self.reward_weights.to(rewards.device),
            group_size,
            scale=self.scale_rewards,
            aggregation=self.multi_objective_aggregation,
        )

    def group_rewards(
        self, rewards: torch.Tensor, group_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's (reward, tied) from the gathered (rows, functions) matrix.

        ``reward`` is TRL's weighted sum, NaN for a row that no function scored. ``tied`` tells whether all
        scored rows of the group have equal rewards; with ``normalize_then_sum`` that means equal in every
        function, because each is normalised by itself.
        """
        weights = self.reward_weights.to(rewards.device)
        reward = (rewards * weights).nansum(dim=1)
        reward[torch.isnan(rewards).all(dim=1)] = torch.nan
        columns = rewards if self.multi_objective_aggregation == "normalize_then_sum" else reward.unsqueeze(1)
        group_size = group_size or self.group_size
        grouped = columns.view(-1, group_size, columns.size(1))
        low = torch.where(grouped.isnan(), torch.inf, grouped).amin(dim=1)
        high = torch.where(grouped.isnan(), -torch.inf, grouped).amax(dim=1)
        tied = (low >= high).all(dim=1).repeat_interleave(group_size)
        rows = rewards.size(0) // self.accelerator.num_processes
        local = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        return reward[local], tied[local]

    @contextlib.contextmanager
    def generation_temperature(self, temperature: float) -> Iterator[None]:
        """Sample at ``temperature``; scores keep dividing the logits by the run's own."""
        sampler = self.vllm_generation if self.use_vllm else self.generation_config
        before = sampler.temperature
        sampler.temperature = temperature
        try:
            yield
        finally:
            sampler.temperature = before

    @property
    def input_rows(self) -> Any:
        """The training set with the columns that reach a generation."""
        data = self.train_dataset
        return self._remove_unused_columns(data, "training") if self.args.remove_unused_columns else data
