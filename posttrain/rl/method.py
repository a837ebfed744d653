"""The method protocol of the GRPO family.

A method is a pure function (tensors in, tensors out) and a small class that wires it to one or more
stages. The class is a pydantic model: its fields are the configuration, typed and ranged, and they can be
read without importing torch. Stages, in order; each has a default that does nothing:

=============  ===========================  ====================================================
stage          when                         hook
=============  ===========================  ====================================================
reference      before each generation       :meth:`Method.refresh_reference`
scoring        once per generation batch,   :meth:`Method.score_old`
               off-policy schedules only
reward         once per generation batch    :meth:`Method.label`, then :meth:`Method.rewards`
refill         once per generation batch    :meth:`Method.dead_groups`, :meth:`Method.refilled`
rows           once per generation batch    :meth:`Method.keep_rows`
advantage      once per generation batch    :meth:`Method.advantages`
extra rows     once per generation batch    :meth:`Method.plan_extra`, then :meth:`Method.admit`
live rows      every micro-step             :meth:`Method.live_rows`
token mask     every micro-step             :meth:`Method.token_mask`
token weight   every micro-step             :meth:`Method.token_weights`, :meth:`Method.kl_weights`
token penalty  every micro-step             :meth:`Method.token_penalty`, :meth:`Method.unclipped`,
                                            :meth:`Method.mean_penalty`
optimiser      once per optimiser step      :meth:`Method.optimizer_step`
=============  ===========================  ====================================================

To add a method, write one file in ``posttrain/rl/`` with one subclass of :class:`Method`; it is found by
its ``name``. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from posttrain.config.launch import SHARDED, TITLES, Mode

if TYPE_CHECKING:
    import torch

    from posttrain.kernels.head import Scored
    from posttrain.rl.gauges import Gauges

Need = Literal["ref_logps", "movable_reference", "old_logps", "embeddings", "head", "old_head"]
"""What the trainer can compute once for all methods that ask for it.

``ref_logps``: log-probabilities under the initial policy, whatever ``beta`` is.
``movable_reference``: a reference whose weights can be replaced, see :meth:`Method.refresh_reference`.
``old_logps``: :attr:`Rollout.old_logps` also on-policy, at the price of one forward per rollout.
``embeddings``: :attr:`Rollout.embeddings`; one forward per rollout, which also gives ``old_logps``.
``head``: :attr:`Tokens.head`, what the training forward feeds to the LM head; no extra forward.
``old_head``: the same for the policy that generated; no extra forward. Off-policy :meth:`Method.score_old` is
called in the old log-prob pass; on-policy it is :attr:`Tokens.head`.
"""


@dataclass(frozen=True)
class Setup:
    """What a method may look at when the configuration is read; no torch, no model.

    Attributes:
        trainer: Every field of the TRL configuration with its value (defaults filled in).
        methods: Names of all methods of the run, in order.
        adapter: Whether a PEFT adapter is trained.
        task: ``"rlvr"`` or ``"ttrl"`` in a config run, or None when the trainer is built in Python.
        rewards: Number of reward functions, or None when it is not known yet.
        ranks: Number of training processes of this launch.
        launch: How they were launched: who holds which weights.
        reward_names: Names of the reward functions, or None when not known yet.
        reward_weights: Their weights, or None when not known yet.
        needs_all_rows: Names of the methods that act on rows without advantage, see
            :attr:`Method.needs_all_rows`.
    """

    trainer: Mapping[str, Any]
    methods: tuple[str, ...] = ()
    adapter: bool = False
    task: str | None = None
    rewards: int | None = None
    ranks: int = 1
    launch: Mode = "single"
    reward_names: tuple[str, ...] | None = None
    reward_weights: tuple[float, ...] | None = None
    needs_all_rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conflict:
    """One reason why a setup cannot (error) or should not (warning) run.

    Attributes:
        message: What was found, what was needed and the fix.
        field: The field of ``trainer`` or of the method that is to be changed, for the line number.
        fatal: Whether the run is refused.
    """

    message: str
    field: str | None = None
    fatal: bool = True


def not_sharded(setup: Setup, does: str) -> Iterator[Conflict]:
    """Refuse launches that shard weights, gradients or the optimiser, for a method that needs them whole.

    Args:
        setup: What the method may look at.
        does: Its name and what it does with them.
    """
    if setup.launch in SHARDED:
        field = next((name for name in ("deepspeed", "fsdp") if setup.trainer.get(name)), None)
        yield Conflict(f"{does}, which {TITLES[setup.launch]} shards: launch with plain DDP", field=field)


@dataclass
class Samples:
    """What the policy wrote, in the reward stage: the B rows of this rank. Data columns are not in it.

    Attributes:
        completions: Texts, or lists of messages.
        truncated: Per row, whether it was cut at the length limit.
        group_size: Completions per prompt; groups are contiguous over the rows of all ranks in rank order.
        prompts: Per row, what tells its prompt from others.
        again: Whether these are further samples of prompts that the generation batch already has, see
            :meth:`Method.plan_extra`.
        mask_truncated: Whether the loss leaves truncated rows out (``mask_truncated_completions``).
        rank: Number of this process.
        ranks: Number of processes.
        gather: Collective: turns this rank's list into the concatenation over all ranks, in rank order.
        gauges: Where a method logs numbers.
    """

    completions: Sequence[Any]
    truncated: Sequence[bool]
    group_size: int
    gauges: Gauges
    prompts: Sequence[str] = ()
    again: bool = False
    mask_truncated: bool = False
    rank: int = 0
    ranks: int = 1
    gather: Callable[[list[Any]], list[Any]] = list


@dataclass(frozen=True)
class AllRows:
    """The generation batch over all ranks, the same on every rank. N rows that train, F reward functions.

    Attributes:
        rewards: (N, F), whole groups one after the other, in rank order; NaN where a function does not apply.
        scored: (M, F), also with the rows that :meth:`Method.keep_rows` took out and the groups that were
            replaced: what the policy really did.
        names: Names of the reward functions, in the order of the columns.
        weights: (F,) their weights.
        group_size: Rows per group.
        first: Index of this rank's first row.
        normalise: Turns (N,) values, NaN allowed, into advantages with this run's ``scale_rewards``.
    """

    rewards: torch.Tensor
    scored: torch.Tensor
    names: tuple[str, ...]
    weights: torch.Tensor
    group_size: int
    normalise: Callable[[torch.Tensor], torch.Tensor]
    first: int = 0


@dataclass
class Rollout:
    """One generation batch on this rank, after rewards. B rows, C completion tokens, F reward functions.

    Attributes:
        rewards: (B, F), one column per reward function, NaN where a function does not apply.
        reward: (B,), the weighted sum that TRL normalises; NaN for a row without any reward.
        tied: (B,) bool, the row's group has all rewards equal, so its advantage is zero by definition.
            A method that makes advantages from something else says so here.
        advantages: (B,) or (B, C) as TRL computed them, then as earlier methods left them.
        mask: (B, C), 1 on tokens written by the model.
        old_logps: (B, C) under the policy that generated; None on-policy (equal to the live ones) unless a
            method needs them.
        ref_logps: (B, C) under the initial policy, or None when nobody needs them.
        carry: Row-shaped tensors a method wants back in the loss, by key; shuffled and split with the rows.
            Starts with what :meth:`Method.score_old` returned.
        gauges: Where a method logs numbers.
        gather: Collective: turns this rank's (B, C) floats into those of all ranks, in rank order; columns
            that a rank does not have are NaN.
        everyone: The rewards of all ranks.
        embeddings: (B, H) fp32, mean over the model-written tokens of the policy's final hidden state at the
            token, zeros for a row without tokens; None when nobody needs them.
        texts: Returns the B completions as text.
        dead: (B,) bool, rows of groups that :meth:`Method.dead_groups` refused and that could not be
            replaced, or None when no method refuses groups.
        training: False in evaluation, where no state may change.
    """

    rewards: torch.Tensor
    reward: torch.Tensor
    tied: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    old_logps: torch.Tensor | None
    ref_logps: torch.Tensor | None
    gauges: Gauges
    carry: dict[str, torch.Tensor] = field(default_factory=dict)
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    everyone: AllRows | None = None
    embeddings: torch.Tensor | None = None
    texts: Callable[[], list[str]] = list
    dead: torch.Tensor | None = None
    training: bool = True

    def local(self, values: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows of (N, ...) values of all ranks."""
        assert self.everyone is not None
        return values[self.everyone.first :][: self.mask.size(0)]


@dataclass(frozen=True)
class Refill:
    """What :meth:`Method.dead_groups` led to in one generation batch, the same on every rank.

    Attributes:
        outcomes: (groups, group size, F), the verifiers' matrix of the first generation.
        dead: (groups,) bool, refused then.
        left: (groups,) bool, refused groups that could not be replaced.
        rounds: Generations that were added.
        rows: Rows they made, over all ranks.
        tokens: Tokens they made.
        names: Names of the reward functions.
        gauges: Where a method logs numbers.
    """

    outcomes: torch.Tensor
    dead: torch.Tensor
    left: torch.Tensor
    rounds: int
    rows: int
    tokens: int
    names: tuple[str, ...]
    gauges: Gauges


@dataclass(frozen=True)
class ExtraPlan:
    """A second generation for some prompts of the batch.

    Attributes:
        temperature: Of the sampling alone, relative to the run's; scores keep the run's.
        prompts: Share of the groups, the first ones; at least one group, and as many as can be dealt out.
        replace: Admitted rows take the places of the first rows of the batch; otherwise they are appended.
    """

    temperature: float
    prompts: float
    replace: bool


@dataclass(frozen=True)
class Extra:
    """The rows of a second generation on all ranks, whole groups one after the other. N rows.

    Attributes:
        rewards: (N, F), the verifiers' matrix.
        advantages: (N,) of TRL, within these groups.
        tokens: (N,) tokens that count in the loss.
        names: Names of the reward functions.
        rows: Rows of the generation batch over all ranks.
        gauges: Where a method logs numbers.
    """

    rewards: torch.Tensor
    advantages: torch.Tensor
    tokens: torch.Tensor
    names: tuple[str, ...]
    rows: int
    gauges: Gauges


@dataclass(frozen=True)
class Admission:
    """Which rows of a second generation train, and how much.

    Attributes:
        rows: (m,) indices into :class:`Extra`; all rows in order where they are appended.
        advantages: (m,) on every token.
        weight: Factor of these rows in the loss.
        main_weight: Factor of every term of the other rows.
    """

    rows: torch.Tensor
    advantages: torch.Tensor
    weight: float = 1.0
    main_weight: float = 1.0


@dataclass
class Tokens:
    """One micro-batch in the loss. B rows, C completion tokens.

    Attributes:
        logps: (B, C) log pi of the sampled tokens, natural log, fp32, with gradient.
        entropies: (B, C) in nats, with gradient.
        old_logps: (B, C) without gradient; on-policy the live values, detached.
        ref_logps: (B, C) under the initial policy, or None when nobody needs them.
        advantages: (B,) or (B, C) as the advantage stage left them.
        reward: (B,) weighted reward of each row.
        tied: (B,) bool, all rewards of the row's group are equal.
        mask: (B, C), 1 on tokens written by the model; 0 on the rows of :meth:`Method.admit`, which no method
            masks, weighs or penalises.
        extra_mask: (B, C), 1 on the tokens of those rows, or None when there are none.
        focus: (B, C) bool, tokens that every method's :meth:`Method.token_mask` kept, or None when no method
            has one.
        head: What the forward fed to the LM head, or None when nobody needs it.
        kl_weights: (B, 1) or (B, C), product of all methods' :meth:`Method.kl_weights`, or None when no
            method has one.
        reduce: Collective: the sum of a tensor over all ranks.
        training: False in evaluation, where no state may change.
        carry: What :attr:`Rollout.carry` held for these rows.
        gauges: Where a method logs numbers.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    advantages: torch.Tensor
    reward: torch.Tensor
    tied: torch.Tensor
    mask: torch.Tensor
    gauges: Gauges
    carry: dict[str, torch.Tensor] = field(default_factory=dict)
    extra_mask: torch.Tensor | None = None
    focus: torch.Tensor | None = None
    head: Scored | None = None
    kl_weights: torch.Tensor | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    training: bool = True


class Method(BaseModel):
    """Base class of every method.

    Subclasses set ``name``, ``title`` and ``paper``, declare their parameters as pydantic fields, and
    override the stages they act in. The docstring of their module is their documentation page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None

    @property
    def neutral(self) -> bool:
        """Whether the parameters make the method do nothing; it is then skipped, bit for bit."""
        return False

    @property
    def needs_all_rows(self) -> bool:
        """Whether rows with advantage 0 matter to what this method adds to the loss or chooses by.

        By default so for every method with a penalty. A method whose penalty is zero on such rows says False.
        """
        own, base = type(self), Method
        return (own.token_penalty, own.mean_penalty) != (base.token_penalty, base.mean_penalty)

    @property
    def refill_rounds(self) -> int:
        """How often groups that :meth:`dead_groups` refuses are generated again; 0 for never."""
        return 0

    @property
    def samples_otherwise(self) -> bool:
        """Whether :meth:`plan_extra` asks for rows, which may be sampled at another temperature."""
        return type(self).plan_extra is not Method.plan_extra

    @property
    def needs(self) -> frozenset[Need]:
        """What the trainer has to compute for this method."""
        return frozenset()

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Yield what in ``setup`` does not go with this method. Called before anything is loaded."""
        del setup
        return iter(())

    def refresh_reference(self) -> bool:
        """Return whether the current policy becomes the reference now; the same on every rank.

        Asked in training before each generation, so that a batch never mixes two references. Needs
        ``movable_reference``.
        """
        return False

    def score_old(self, scored: Scored) -> dict[str, torch.Tensor]:
        """Return (b, C) tensors for :attr:`Rollout.carry` from the LM head of the policy that generated.

        Called without gradient for consecutive parts of the generation batch, when ``needs`` has ``old_head``
        and the schedule is off-policy; on-policy the live head says the same.
        """
        del scored
        return {}

    def label(self, rewards: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Return the gathered (rows of all ranks, reward functions) matrix, made from what was written.

        Called in training only, with the verifiers' matrix.
        """
        del samples
        return rewards

    def rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """Reshape the gathered (completions of all ranks x reward functions) matrix."""
        return rewards

    def dead_groups(self, outcomes: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor | None:
        """Return the groups to replace by groups of other prompts, (groups,) bool, or None for none.

        Args:
            outcomes: (groups, group size, F) of all ranks, before any method's :meth:`rewards`.
            names: Names of the reward functions, in the order of the columns.

        Called in training only, for the generation batch and for every group generated in its place, where
        :attr:`refill_rounds` is above 0.
        """
        del outcomes, names
        return None

    def refilled(self, refill: Refill) -> None:
        """Log what came of :meth:`dead_groups`; once per generation batch."""

    def keep_rows(self, rewards: torch.Tensor) -> torch.Tensor | None:
        """Return which rows train, (groups, group size) bool, the same number in every group; None for all.

        Args:
            rewards: (groups, group size, functions) of all ranks; must return the same on every rank.

        Advantages and the number of active tokens are computed again on the rows that stay. Called in
        training only.
        """
        del rewards
        return None

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Return the advantages to use, (B,) or (B, C)."""
        return rollout.advantages

    def plan_extra(self) -> ExtraPlan | None:
        """Return what to generate beside the batch, the same on every rank; None for nothing.

        Called in training only. One method per run may ask.
        """
        return None

    def admit(self, extra: Extra) -> Admission:
        """Return which of the rows that :meth:`plan_extra` asked for train; the same on every rank.

        On these rows no method acts, and the KL term is zero.
        """
        raise NotImplementedError(f"{self.name} plans extra rows and must say which are admitted")

    def live_rows(self, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Return the rows of a micro-batch that go through the model, (B,) bool, or None for all.

        The others must have a gradient of exactly zero, see :mod:`posttrain.rl.skip_zero_advantage`. Divisors
        do not change; what is logged in the loss is over the rows that stay.
        """
        del advantages, mask
        return None

    def token_mask(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the tokens that train, (B, C) bool, or None for all.

        The policy term and TRL's own KL term (``beta``) are exactly zero elsewhere, in value and gradient;
        the divisor does not change. Penalties of other methods find the result in :attr:`Tokens.focus`.
        """
        del tokens
        return None

    def token_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Return non-negative factors of the policy term, (B, 1) or (B, C), or None for all ones."""
        del tokens
        return None

    def kl_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Return factors >= 0 of TRL's own KL term (``beta``), (B, 1) or (B, C), or None for all ones.

        The divisor does not change. TRL's logged ``kl`` counts a factor above 0 as 1.
        """
        del tokens
        return None

    def token_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Return a (B, C) term to add to the per-token loss, or None. It gets the base loss's divisor."""
        del tokens
        return None

    def unclipped(self, tokens: Tokens) -> torch.Tensor | None:
        """Return (B, C) bool, tokens whose policy term is A r also below 1 - epsilon, or None.

        Asked after :meth:`token_penalty`. It changes something where the advantage is negative: there the
        clip stops the gradient. For ``loss_type`` grpo, bnpo, dr_grpo and dapo.
        """
        del tokens
        return None

    def mean_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Return a 0-dim mean to add to the loss, or None; it is divided by gradient accumulation only."""
        del tokens
        return None

    def optimizer_step(self) -> None:
        """Update controllers; called once per optimiser step, on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on exactly; tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"method {self.name!r} keeps no state, but the checkpoint holds {sorted(state)}")
