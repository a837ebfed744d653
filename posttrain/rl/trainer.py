"""``posttrain.GRPOTrainer``: TRL's trainer, same arguments, plus ``methods=``.

The trainer knows stages, not methods. Each micro-step it multiplies the policy term of every token by the
product of the methods' weights and adds the sum of their penalties; each rollout it lets them reshape
rewards and advantages. What several methods need is computed once. With ``methods=[]``, or with every method
at its neutral setting, nothing below runs and the result is TRL's, bit for bit; only where TRL takes
another model for the initial policy (some adapters, :mod:`posttrain.adapters.reference`) that is put right.

How weights reach TRL's loss: every ``loss_type`` is positively homogeneous in the advantage, so a weight
w >= 0 on the advantage is a weight on the policy term. TRL accepts per-token advantages.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain.guards import FiniteGuard
from posttrain.kernels.head import Scored
from posttrain.kernels.kept import Truncation
from posttrain.methods import setup_of, vet
from posttrain.rl.formulas import group_advantages
from posttrain.rl.gauges import Gauges
from posttrain.rl.method import (
    AllRows,
    Conflict,
    Method,
    Need,
    Rollout,
    Samples,
    Tokens,
)
from posttrain.rl.rollouts import MoreRollouts
from posttrain.rl.rows import CARRY as _CARRY
from posttrain.rl.seams import reward_name
from posttrain.rollout.settings import RolloutSettings
from posttrain.rollout.truncation import cuts, truncation_problem
from posttrain.selection.trainer import SelectionMixin

if TYPE_CHECKING:
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.selector import Selector
    from posttrain.selection.settings import Select

logger = logging.getLogger(__name__)


class GRPOTrainer(SelectionMixin, FiniteGuard, MoreRollouts):
    """Group-relative policy optimisation with methods that compose.

    Args:
        *args: As ``trl.GRPOTrainer``.
        methods: Methods in the order in which they act. Conflicts are refused here, before the model loads.
        selection: Which weights train: a plan, a selector, either with settings, or None for what TRL trains.
        rollout: What TRL has no fields for: see :mod:`posttrain.rollout.truncation`.
        **kwargs: As ``trl.GRPOTrainer``.

    Raises:
        ValueError: Two methods of one name, or a combination that a method refuses.
        TypeError: An entry of ``methods`` is not a :class:`~posttrain.rl.method.Method`.
        FloatingPointError: During training, when a reward, log-probability, loss or gradient is not finite.
    """

    def __init__(
        self,
        *args: Any,
        methods: Sequence[Method] = (),
        selection: SelectionPlan | Selector | Select | None = None,
        rollout: RolloutSettings | None = None,
        **kwargs: Any,
    ) -> None:
        self.methods: tuple[Method, ...] = tuple(methods)
        self._active = tuple(method for method in self.methods if not getattr(method, "neutral", False))
        given = inspect.signature(TRLGRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        model, peft_config = given.get("model"), given.get("peft_config")
        adapter = isinstance(model, PeftModel) or peft_config is not None
        check_methods(
            self.methods,
            given.get("args"),
            adapter=adapter,
            # an environment may bring a reward of its own, which is not known yet
            reward_names=None if given.get("environment_factory") else _names(given.get("reward_funcs")),
        )
        self.hooked = bool(self._active)
        self.wants_reference = self._anyone_needs("ref_logps")
        self.wants_movable_reference = self._anyone_needs("movable_reference")
        self.wants_old_logps = self._anyone_needs("old_logps")
        self.wants_embeddings = self._anyone_needs("embeddings")
        self.wants_head = self._anyone_needs("head")
        self.wants_old_head = self._anyone_needs("old_head")
        self._gauges = Gauges()
        self.rollout_settings = rollout or RolloutSettings()
        self._check_sampling(given.get("args") or GRPOConfig())
        super().__init__(*args, **kwargs)
        self.refuse_late()
        self.start_selection(selection)

    def _anyone_needs(self, need: Need) -> bool:
        return any(need in method.needs for method in self._active)

    def _check_sampling(self, config: GRPOConfig) -> None:
        """Say how sampling is cut, and refuse what the loss cannot follow."""
        fields, settings = vars(config), self.rollout_settings
        tempering = next((m.name for m in self._active if m.samples_otherwise), None)
        problem = truncation_problem(fields, settings, ranks=config.world_size, other_temperature=tempering)
        if problem is not None and problem.fatal:
            raise ValueError(f"{problem.message}: {problem.fix}")
        if problem is not None:
            logger.warning("%s (%s)", problem.message, problem.fix)
        cut = cuts(fields)
        if cut:
            self.truncation = Truncation(
                top_p=cut.get("top_p", 1.0),
                top_k=int(cut.get("top_k", 0)),
                min_p=cut.get("min_p", 0.0),
                min_p_first=config.use_vllm,
            )
            self.corrects_truncation = settings.truncated_sampling == "correct"

    # ---- stages -----------------------------------------------------------------------------------------

    def before_generation(self) -> None:
        """Let a method make the current policy the reference."""
        answers = [method.refresh_reference() for method in self._active]  # all: asking may reset a counter
        if any(answers):
            self.refresh_reference()

    def on_old_head(self, scored: Scored) -> dict[str, torch.Tensor]:
        """Collect what methods carry from the policy that generated."""
        carried = [method.score_old(scored) for method in self._active]
        return {f"{_CARRY}carry/{key}": value for values in carried for key, value in values.items()}

    def on_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Take failed rows out, refuse infinite rewards, then let methods label and reshape."""
        rewards = self.drop_failed_rows(rewards)
        self.refuse_infinite_rewards(rewards)
        if self._active and self.mode == "train":
            rewards = self._labelled(rewards)
        self.outcomes = rewards
        for method in self._active:
            rewards = method.rewards(rewards)
        return rewards

    def _labelled(self, rewards: torch.Tensor) -> torch.Tensor:
        completions, truncated, prompts = self.scored_completions()
        samples = Samples(
            completions=completions,
            truncated=truncated,
            prompts=[repr(prompt) for prompt in prompts],
            again=self._again,
            group_size=self.group_size,
            mask_truncated=self.mask_truncated_completions,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            gather=gather_object,
            gauges=self._gauges,
        )
        for method in self._active:
            self._gauges.enter(method.name)
            rewards = method.label(rewards, samples)
        return rewards

    def _keep_rows(
        self, batch: dict[str, Any], rewards: torch.Tensor
    ) -> tuple[dict[str, Any], torch.Tensor, int]:
        """Return the batch and the gathered rewards with the rows that train, and the size of their groups.

        Raises:
            ValueError: The rows that stay cannot be dealt out evenly over ranks and micro-steps.
        """
        size = self.group_size
        wanted = (method.keep_rows(rewards.view(-1, size, rewards.size(1))) for method in self._active)
        masks = [mask for mask in wanted if mask is not None]
        if not masks:
            return batch, rewards, size
        kept = torch.stack(masks).all(dim=0)
        flat = kept.flatten()
        ranks, steps = self.accelerator.num_processes, self.args.steps_per_generation
        counts, per_rank = kept.sum(dim=1).tolist(), flat.view(ranks, -1).sum(dim=1).tolist()
        if len(set(counts)) > 1 or len(set(per_rank)) > 1 or per_rank[0] == 0 or per_rank[0] % steps:
            raise ValueError(
                "the rows that stay must be equally many in every group and on every rank, and a multiple of "
                f"steps_per_generation={steps}; found {sorted(set(counts))} per group and {per_rank} per rank"
                ". Choose per_device_train_batch_size so that a rank holds whole groups and a micro-step an "
                "equal share of each."
            )
        local = flat.view(ranks, -1)[self.accelerator.process_index].nonzero().flatten()
        batch, rewards, size = self.select_rows(batch, local), rewards[flat], counts[0]
        advantages = self.advantages_of(rewards, size)
        self.log_advantages(torch.zeros_like(flat, dtype=advantages.dtype).masked_scatter(flat, advantages))
        batch["advantages"] = advantages.view(ranks, -1)[self.accelerator.process_index]
        return batch, rewards, size

    def on_sampled(self, batch: dict[str, Any]) -> None:
        """Log the tail of the gap between sampler and trainer: shares of tokens off by over 10 and 50 %."""
        sampled, own = batch.get("sampling_per_token_logps"), batch.get("old_per_token_logps")
        if sampled is None or own is None:
            return
        gap = (own - sampled).abs()
        known = self.loss_mask(batch).bool() & ~gap.isnan()
        self._gauges.enter("rollout_gap")
        for percent in (10, 50):
            self._gauges.mean(f"over_{percent}_percent", gap > math.log1p(percent / 100), where=known)
        self._log_gauges()

    def on_rollout(self, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Row and advantage stages."""
        size = self.group_size
        scored = rewards if self._really_done is None else self._really_done
        if self.mode == "train":
            batch, rewards, size = self._keep_rows(batch, rewards)
        reward, tied = self.group_rewards(rewards, size)
        rows = batch["prompt_ids"].size(0)
        first = self.accelerator.process_index * rows
        rollout = Rollout(
            rewards=rewards[first:][:rows],
            reward=reward,
            tied=tied,
            advantages=batch["advantages"],
            mask=self.loss_mask(batch),
            old_logps=batch.get("old_per_token_logps", batch.pop(f"{_CARRY}old_logps", None)),
            ref_logps=batch.get("ref_per_token_logps"),
            gauges=self._gauges,
            carry=_carried(batch),
            gather=self._gather_rows,
            everyone=self._everyone(rewards, scored, size, first),
            embeddings=batch.pop(f"{_CARRY}embeddings", None),
            texts=lambda: self.texts_of(batch),
            dead=None if self._dead is None else self._dead.repeat_interleave(size)[first:][:rows],
            training=self.mode == "train",
        )
        for method in self._active:
            self._gauges.enter(method.name)
            rollout.advantages = method.advantages(rollout)
        self._log_gauges()
        batch["advantages"] = rollout.advantages
        batch[f"{_CARRY}reward"], batch[f"{_CARRY}tied"] = reward, rollout.tied
        batch.update({f"{_CARRY}carry/{key}": value for key, value in rollout.carry.items()})
        return batch

    def _everyone(self, rewards: torch.Tensor, scored: torch.Tensor, size: int, first: int) -> AllRows:
        one = torch.ones(1, device=rewards.device)
        return AllRows(
            rewards=rewards,
            scored=scored,
            names=tuple(self.reward_func_names),
            weights=self.reward_weights.to(rewards.device),
            group_size=size,
            normalise=lambda values: group_advantages(
                values.unsqueeze(1), one, size, scale=self.scale_rewards
            ),
            first=first,
        )

    def on_tokens(self, batch: dict[str, Any], logps: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        """Token stages: masks and factors of the KL term, then of the policy term through its advantages."""
        old_logps = batch.get("old_per_token_logps")
        mask, extra = self.loss_mask(batch), batch.get(f"{_CARRY}extra")
        self._tokens = Tokens(
            logps=logps,
            entropies=entropies,
            old_logps=logps.detach() if old_logps is None else old_logps,
            ref_logps=batch.get("ref_per_token_logps"),
            advantages=batch["advantages"],
            reward=batch[f"{_CARRY}reward"],
            tied=batch[f"{_CARRY}tied"],
            mask=mask if extra is None else mask * ~extra.unsqueeze(1),
            extra_mask=None if extra is None else mask * extra.unsqueeze(1),
            gauges=self._gauges,
            carry=_carried(batch),
            head=self.live_head,
            reduce=lambda values: self.accelerator.reduce(values, reduction="sum"),
            training=self.mode == "train",
        )
        self._focus(batch)
        self._weigh_kl(batch)
        advantages = batch["advantages"]
        for method in self._active:
            self._gauges.enter(method.name)
            weights = method.token_weights(self._tokens)
            if weights is not None:
                if extra is not None:
                    weights = torch.where(extra.unsqueeze(1), 1.0, weights)
                columns = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
                advantages = columns * weights.detach().to(columns.dtype)
        return advantages

    def _focus(self, batch: dict[str, Any]) -> None:
        """Restrict the policy term and TRL's KL term to the tokens that every method lets train."""
        tokens = self._tokens
        for method in self._active:
            self._gauges.enter(method.name)
            mask = method.token_mask(tokens)
            if mask is not None:
                tokens.focus = mask if tokens.focus is None else tokens.focus & mask
        if tokens.focus is None:
            return
        if tokens.extra_mask is not None:
            tokens.focus = tokens.focus | tokens.extra_mask.bool()
        advantages = batch["advantages"]
        columns = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        batch["advantages"] = columns * tokens.focus
        self._keep_kl(batch, tokens.focus)

    def _keep_kl(self, batch: dict[str, Any], where: torch.Tensor) -> None:
        """Take TRL's KL term away where ``where``, (B, 1) or (B, C) bool, is False."""
        if self.beta != 0.0:
            # where the reference equals the policy, the KL estimate is 0 and so is its derivative
            live = self._tokens.logps.detach()
            batch["ref_per_token_logps"] = torch.where(where, batch["ref_per_token_logps"], live)

    def _weigh_kl(self, batch: dict[str, Any]) -> None:
        """Take TRL's KL term away where its factor is 0; :meth:`on_loss` adds what other factors need."""
        tokens = self._tokens
        if f"{_CARRY}extra" in batch:
            rows = torch.where(batch[f"{_CARRY}extra"], 0.0, batch[f"{_CARRY}weight"])
            tokens.kl_weights = rows.unsqueeze(1)
        for method in self._active:
            self._gauges.enter(method.name)
            weights = method.kl_weights(tokens)
            if weights is not None:
                weights = weights.detach()
                tokens.kl_weights = weights if tokens.kl_weights is None else tokens.kl_weights * weights
        if tokens.kl_weights is not None and (tokens.kl_weights == 0).any():
            self._keep_kl(batch, tokens.kl_weights != 0)

    def on_loss(self, loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        """Add the penalties, with the divisors of the base loss."""
        for method in self._active:
            self._gauges.enter(method.name)
            penalty = method.token_penalty(self._tokens)
            if penalty is not None:
                if "importance_sampling_ratio" in batch:
                    # rows or tokens that the correction for the sampler threw out do not count here either
                    penalty = penalty.masked_fill(batch["importance_sampling_ratio"] == 0, 0.0)
                if f"{_CARRY}extra" in batch:
                    rows = torch.where(batch[f"{_CARRY}extra"], 0.0, batch[f"{_CARRY}weight"])
                    penalty = penalty * rows.unsqueeze(1)
                loss = loss + self.aggregate(penalty, batch)
            unclipped = method.unclipped(self._tokens) if self.epsilon_low < 1 else None
            if unclipped is not None:
                loss = loss + self.aggregate(self.unclip_term(batch, self._tokens.logps, unclipped), batch)
            mean = method.mean_penalty(self._tokens)
            if mean is not None:
                loss = loss + mean / self.accumulation
        weights = self._tokens.kl_weights
        if self.beta != 0.0 and weights is not None and ((weights != 0) & (weights != 1)).any():
            loss = loss + self.aggregate((weights - 1) * self.kl_term(batch, self._tokens.logps), batch)
        self._log_gauges()
        del self._tokens
        return loss

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        # ranks may hold completions of different lengths
        padded = self.accelerator.pad_across_processes(values, dim=1, pad_index=torch.nan)
        return self.accelerator.gather(padded)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step; the last one of an optimiser step also moves the methods' controllers."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for method in self._active:
                method.optimizer_step()
        return loss

    # ---- rows that must not count -----------------------------------------------------------------------

    def drop_failed_rows(self, rewards: torch.Tensor) -> torch.Tensor:
        """Take rows whose verifier failed out of their group's baseline.

        TRL sums over reward functions and counts a missing one as 0. A verifier that crashed or ran out of
        time says nothing about the answer, so the whole row is left out instead (advantage 0).
        """
        flags = [function.failed for function in self.reward_funcs if hasattr(function, "failed")]
        if not flags:
            return rewards
        failed = torch.tensor([any(row) for row in zip(*flags, strict=True)], device=rewards.device)
        failed = self.accelerator.gather(failed)
        return rewards.masked_fill(failed.unsqueeze(1), torch.nan)

    def refuse_infinite_rewards(self, rewards: torch.Tensor) -> None:
        """Stop on an infinite reward, naming rows and functions.

        Raises:
            FloatingPointError: Some reward is +inf or -inf.
        """
        bad = torch.isinf(rewards)
        if bad.any():
            where = [
                f"row {row}: {self.reward_func_names[column]} = {rewards[row, column].item()}"
                for row, column in bad.nonzero().tolist()[:5]
            ]
            raise FloatingPointError(
                f"{int(bad.sum())} infinite rewards at step {self.state.global_step} ({'; '.join(where)}). "
                "Return None for an answer that cannot be scored, or bound the reward."
            )

    # ---- exact resume -----------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what this rank needs to go on, the state of every method included."""
        state = super().extra_state()
        state["methods"] = {method.name: method.state_dict() for method in self.methods}
        if self.wants_movable_reference:
            state["reference"] = self.reference_state()
        if self._prompt_order is not None:
            state["prompts_drawn"] = self._prompt_order.position
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` returned.

        Raises:
            ValueError: The checkpoint was written with other methods.
        """
        saved = state.pop("methods")
        if set(saved) != {method.name for method in self.methods}:
            raise ValueError(
                f"the checkpoint was written with methods {sorted(saved)}, this run has "
                f"{sorted(method.name for method in self.methods)}: resume with the same methods, or start a "
                "new run"
            )
        for method in self.methods:
            method.load_state_dict(saved[method.name])
        if self.wants_movable_reference and "reference" in state:
            self.load_reference_state(state.pop("reference"))
        if "prompts_drawn" in state:
            self.prompt_order.position = state.pop("prompts_drawn")
        super().load_extra_state(state)


def _carried(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return what methods carry from the rollout to the loss, by their own keys."""
    prefix = f"{_CARRY}carry/"
    return {key.removeprefix(prefix): batch[key] for key in batch if key.startswith(prefix)}


def _names(functions: Any) -> tuple[str, ...] | None:
    """Return the names TRL gives to reward functions: one, a list, or None when unknown."""
    if functions is None:
        return None
    listed = functions if isinstance(functions, (list, tuple)) else [functions]
    return tuple(reward_name(function) for function in listed)


def check_methods(
    methods: Sequence[Method],
    config: GRPOConfig | None,
    *,
    adapter: bool,
    reward_names: tuple[str, ...] | None = None,
) -> list[Conflict]:
    """Refuse method combinations that cannot work; warn about doubtful ones.

    Args:
        methods: The methods of the run.
        config: The TRL configuration, or None for its defaults.
        adapter: Whether a PEFT adapter is trained.
        reward_names: Names of the reward functions, None when unknown.

    Returns:
        The warnings.

    Raises:
        ValueError, TypeError: See :class:`GRPOTrainer`.
    """
    weights = None if config is None else config.reward_weights
    if reward_names is not None and weights is None:
        weights = [1.0] * len(reward_names)
    setup = setup_of(
        methods,
        config,
        GRPOConfig,
        adapter=adapter,
        rewards=None if reward_names is None else len(reward_names),
        reward_names=reward_names,
        reward_weights=None if weights is None else tuple(weights),
        needs_all_rows=tuple(
            m.name for m in methods if isinstance(m, Method) and m.needs_all_rows and not m.neutral
        ),
    )
    return vet(methods, Method, setup, example="ACE(alpha=1.0)")
