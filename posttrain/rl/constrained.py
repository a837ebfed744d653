r"""Constrained rewards: each reward is raised to its threshold and no further (arXiv 2310.04373).

Idea
    With several rewards and fixed weights some are pushed past the point where more reward means a worse
    answer. Here each reward has a threshold, and its weight is a bounded Lagrange multiplier: it grows while
    the reward is on the wrong side of the threshold and fades (or, for an equality, turns negative) beyond.
    What is left of the weight goes to a task, by default staying near the initial policy.

Formula
    N constraints with thresholds theta_i, s_i = -1 for ``at_most`` and +1 otherwise. Multipliers mu_i are
    free real numbers. Per generation batch, over the rows of all ranks::

        w_i  = sigmoid(mu_i)  (at_least, at_most)     or  tanh(mu_i)  (equal)
        w_0  = N - sum_i w_i
        A_i  = advantages of reward i alone: centred in its group, divided as ``scale_rewards`` says
        A    = w_0 A_0 + sum_i s_i w_i A_i                         replaces the advantage; w is constant
        v_i  = mean of reward i over all sampled rows
        g_i  = w'(mu_i) s_i (v_i - theta_i)                        all g together clipped to norm max_grad
        mu_i <- clip(mu_i - lr b_i, -cap, cap),   b_i <- momentum b_i + g_i   (b_i = g_i at first)

    The new mu acts from the next generation batch on. A reward that is missing in a row has A_i = 0 there and
    does not count in v_i; missing in the whole batch it leaves mu_i and b_i alone. A group in which reward i
    is constant has A_i = 0 exactly. The mixture is not normalised again: the absolute size of the weights is
    the point.

    ``task`` is A_0: ``kl`` (the paper's) are the advantages of -sum_t (log pi_old - log pi_ref) per row;
    ``beta`` leaves TRL's KL in the loss and multiplies its ``beta`` by w_0 instead; ``rewards`` takes the
    weighted sum of the rewards without a constraint; ``none`` takes nothing.

Defaults and where they come from
    lr 0.1, momentum 0.1 and max_grad 0.5 from the official configuration, which makes about 100 updates per
    rollout where this makes one: the learning rate needs tuning (0.01 to 1). Thresholds in the paper are 0.48
    (intent) and 0.23 (METEOR); they must lie where the policy can go. init 0 (official: a draw with standard
    deviation 0.01). Ours: ``cap`` 5, so that a multiplier can come back from saturation (sigmoid' there is
    0.0066), ``window`` (v_i averaged over the last batches, off at 1), the sequence mean for v_i (the paper
    averages over tokens, which weighs long answers more), and one advantage per row instead of value heads.

Needs
    ``task: kl`` one forward of the reference and, strictly on-policy, one of the policy per rollout.
    ``task: beta`` a ``beta`` above 0. The others nothing.

Composes with
    Any ``loss_type``, LoRA, ACE, GARDO. It comes before methods that rescale advantages, because it replaces
    them. Refused: weights other than 1 on rewards with a constraint (weights are what it computes),
    ``multi_objective_aggregation="normalize_then_sum"`` (it would normalise the mixture), a reward that
    nothing acts on. Keep penalties on a quantity that has a constraint out of the other rewards.

When not to use it
    With one reward and no limit: that is GRPO. With a threshold that cannot be reached, the weight only
    saturates. Oscillation around a threshold is normal: the multiplier integrates the violation, so it turns
    late. Lower ``cap``, raise ``window`` or lower ``lr``. With ``equal`` the weights start at 0, so the first
    batch only knows the task.

Evidence at laptop size
    ``configs/evidence/constrained.yaml`` (commands in its header, five seeds, one CPU core): about half of
    the sums have an even result; 65 of 100 answers shall be even (``equal``), 50 right (``at_least``). In the
    first five steps 50 are even and 65 right (which the next ten steps lower to 54 in every arm). Means over
    the last third of 90 steps, with 95 % t intervals over seeds; KL at the end::

        weights          even (0.65)            right (>= 0.5)         KL (nats)
        learned          0.679 [0.656, 0.702]   0.483 [0.459, 0.507]   0.24
        fixed, 1 : 1     0.845 [0.834, 0.856]   0.427 [0.407, 0.447]   0.42
        fixed, 1 : 3     0.554 [0.528, 0.579]   0.482 [0.456, 0.508]   0.25

    Equal fixed weights overshoot (0.87 at the end) and give up right answers; three times the weight for
    right answers never gets there. The learned weight passes the threshold (peaks of 0.71 to 0.75), turns,
    and comes back slowly: the means of all seeds lie within 0.06 of the first threshold and 0.04 of the
    second. It is not exact: the first interval leaves out 0.65, and single logs of five steps, which are
    noisy, miss by up to 0.08 and 0.10 (1 : 1: 0.25 and 0.16; 1 : 3: 0.16 and 0.10). What damps the loop is a
    slow multiplier and a KL term in the loss: with ``methods.constrained.task=kl trainer.beta=0
    methods.constrained.lr=1`` one run swung from 0.50 over 0.77 to 0.50 and again to 0.74.

Official code
    tedmoskovitz/ConstrainedRL4LMs (PPO). Thresholds there go by position, and the two shipped files disagree
    about the order; here they go by name. Its branch without bounded weights drops the first multiplier, and
    upper bounds are not in it. The search for thresholds (Nelder-Mead over whole runs) is not offered.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import AllRows, Conflict, Method, Need, Rollout, Setup, Tokens

# Methods that rescale the advantages they find.
_RESCALE = ("gardo_diversity", "aepo")


def bounded_weights(multipliers: torch.Tensor, equality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of the constraints and of the task (arXiv 2310.04373).

    Args:
        multipliers: (N,) mu.
        equality: (N,) bool, which constraints are equalities.

    Returns:
        (N,) weights, in [0, 1] or for equalities in [-1, 1], and the 0-dim weight of the task; they sum to N.
    """
    weights = torch.where(equality, multipliers.tanh(), multipliers.sigmoid())
    return weights, len(weights) - weights.sum()


def mixed_advantages(
    task: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    task_weight: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    """Return w_0 A_0 + sum_i s_i w_i A_i, without gradient into the weights.

    Args:
        task: (B,) A_0.
        advantages: (B, N) A_i.
        weights: (N,) of :func:`bounded_weights`.
        task_weight: 0-dim, of :func:`bounded_weights`.
        signs: (N,) -1 for upper bounds, +1 otherwise.
    """
    factors = (signs * weights).detach().to(advantages)
    return task_weight.detach().to(task) * task + (advantages * factors).sum(dim=1)


def multiplier_gradient(
    multipliers: torch.Tensor,
    equality: torch.Tensor,
    values: torch.Tensor,
    thresholds: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    """Return dL/dmu of L = sum_i w(mu_i) s_i (v_i - theta_i), (N,); NaN where v_i is NaN.

    Args:
        multipliers: (N,) mu.
        equality: (N,) bool.
        values: (N,) v, measured means of the rewards; NaN for a reward without any value.
        thresholds: (N,) theta.
        signs: (N,) -1 for upper bounds, +1 otherwise.
    """
    weights, _ = bounded_weights(multipliers, equality)
    slope = torch.where(equality, 1 - weights**2, weights * (1 - weights))
    return slope * signs * (values - thresholds)


def multiplier_step(
    multipliers: torch.Tensor,
    buffers: torch.Tensor,
    gradient: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    max_grad: float | None = None,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the multipliers and momentum buffers after one step of SGD.

    Args:
        multipliers: (N,) mu.
        buffers: (N,) momentum buffers, NaN before the first step of an entry.
        gradient: (N,); entries that are NaN take no part, their multiplier and buffer stay.
        lr: Learning rate.
        momentum: In [0, 1).
        max_grad: Largest l2 norm of the whole gradient, or None.
        cap: Largest |mu|, or None.
    """
    known = ~gradient.isnan()
    norm = gradient[known].norm()
    if max_grad is not None and norm > max_grad:
        gradient = gradient * (max_grad / norm)
    moved = torch.where(buffers.isnan(), gradient, momentum * buffers + gradient)
    after = multipliers - lr * moved
    if cap is not None:
        after = after.clamp(-cap, cap)
    return torch.where(known, after, multipliers), torch.where(known, moved, buffers)


class Constrained(Method):
    """Learn the weight of each reward from its threshold. See the module page."""

    name = "constrained"
    title = "Constrained rewards: thresholds with learned weights"
    paper = "2310.04373"

    at_least: dict[str, float] = Field(
        default_factory=dict, description="Rewards that must reach a value: {verifier: 0.6}."
    )
    at_most: dict[str, float] = Field(
        default_factory=dict, description="Rewards that must not exceed a value."
    )
    equal: dict[str, float] = Field(default_factory=dict, description="Rewards to be held at a value.")
    task: Literal["kl", "beta", "rewards", "none"] = Field(
        "kl", description="What the rest of the weight goes to; beta scales TRL's KL term, kl is the paper's."
    )
    lr: float = Field(
        0.1, ge=0, description="Learning rate of the multipliers, one step per generation batch."
    )
    momentum: float = Field(0.1, ge=0, lt=1, description="Momentum of that step.")
    init: float = Field(0.0, description="Multipliers at the start; 0 is a weight of 0.5 (0 for equal).")
    max_grad: float | None = Field(0.5, gt=0, description="Largest norm of the gradient of all multipliers.")
    cap: float | None = Field(5.0, gt=0, description="Largest absolute value of a multiplier; ours.")
    window: int = Field(
        1, ge=1, description="Generation batches over which measured rewards are averaged; ours."
    )

    _multipliers: Any = PrivateAttr(default=None)
    _buffers: Any = PrivateAttr(default=None)
    _history: list[Any] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _each_reward_once(self) -> Constrained:
        names = self._names()
        if not names:
            raise ValueError(
                "no constraint: give at_least, at_most or equal a reward and its threshold, for example "
                "at_least: {verifier: 0.6}"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"a reward can have one constraint, found more for {', '.join(twice)}")
        if self.cap is not None and abs(self.init) > self.cap:
            raise ValueError(f"init={self.init} lies outside -cap..cap with cap={self.cap}")
        return self

    def _names(self) -> list[str]:
        return [*self.at_least, *self.at_most, *self.equal]

    @property
    def needs(self) -> frozenset[Need]:
        """Log-probabilities of policy and reference at the rollout, for the KL task."""
        return frozenset({"ref_logps", "old_logps"}) if self.task == "kl" else frozenset()

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse names, weights and settings under which a reward would not act as it says."""
        yield from self._reward_conflicts(setup)
        trainer = setup.trainer
        if trainer.get("multi_objective_aggregation") == "normalize_then_sum":
            yield Conflict(
                "the constrained controller mixes normalised rewards itself, and normalize_then_sum would "
                "rescale the mixture: set multi_objective_aggregation to sum_then_normalize",
                field="multi_objective_aggregation",
            )
        beta = trainer.get("beta") or 0.0
        if self.task == "beta" and beta == 0:
            yield Conflict(
                "task 'beta' scales TRL's KL term, but beta is 0: set beta above 0 or task to kl",
                field="beta",
            )
        if self.task == "kl" and beta != 0:
            yield Conflict(
                f"task 'kl' already keeps the policy near the reference, and beta={beta} adds a second KL "
                "that no multiplier controls: set beta to 0 or task to beta",
                field="beta",
                fatal=False,
            )
        if trainer.get("scale_rewards") in ("none", False):
            yield Conflict(
                "without scale_rewards the rewards are mixed in their own units: the largest drowns the rest",
                field="scale_rewards",
                fatal=False,
            )
        if self.name in setup.methods:
            before = [name for name in setup.methods[: setup.methods.index(self.name)] if name in _RESCALE]
            if before:
                yield Conflict(f"constrained replaces advantages: list it before {', '.join(before)}")

    def _reward_conflicts(self, setup: Setup) -> Iterator[Conflict]:
        names, weights = setup.reward_names, setup.reward_weights
        if names is None:
            return
        for name in self._names():
            if names.count(name) != 1:
                yield Conflict(_wrong_name(name, names))
        if weights is None:
            return
        limited = set(self._names())
        free = {name for name, weight in zip(names, weights, strict=True) if weight and name not in limited}
        for name, weight in zip(names, weights, strict=True):
            if name in limited and weight != 1:
                yield Conflict(
                    f"the weight of reward {name!r} is what the controller computes, found weight {weight}: "
                    "leave it at 1",
                    field="reward_weights",
                )
        if self.task == "rewards" and not free:
            yield Conflict(
                "task 'rewards' needs a reward that has a weight but no constraint, found none", field="task"
            )
        if self.task != "rewards" and free:
            yield Conflict(
                f"nothing acts on {', '.join(sorted(free))}: give a constraint, a weight of 0 (then only "
                "logged), or set task to rewards",
                field="task",
            )

    # ---- the controller -----------------------------------------------------------------------------------

    def weights(self) -> dict[str, float]:
        """Return the current weights w_i by reward; the task's is their number minus their sum."""
        values, _ = bounded_weights(self._state()[0], self._equality())
        return dict(zip(self._names(), values.tolist(), strict=True))

    def _state(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._multipliers is None:
            self._multipliers = torch.full((len(self._names()),), self.init, dtype=torch.float64)
            self._buffers = torch.full_like(self._multipliers, torch.nan)
        return self._multipliers, self._buffers

    def _thresholds(self) -> torch.Tensor:
        values = [*self.at_least.values(), *self.at_most.values(), *self.equal.values()]
        return torch.tensor(values, dtype=torch.float64)

    def _signs(self) -> torch.Tensor:
        signs = [1.0] * len(self.at_least) + [-1.0] * len(self.at_most) + [1.0] * len(self.equal)
        return torch.tensor(signs, dtype=torch.float64)

    def _equality(self) -> torch.Tensor:
        return torch.tensor([name in self.equal for name in self._names()])

    def _update(self, values: torch.Tensor) -> None:
        """Take one step with the means of this batch; the same on every rank, because they are."""
        self._history = [*self._history, values][-self.window :]
        multipliers, buffers = self._state()
        gradient = multiplier_gradient(
            multipliers,
            self._equality(),
            torch.stack(self._history).nanmean(dim=0),
            self._thresholds(),
            self._signs(),
        )
        # a reward that this batch does not have is left alone, whatever earlier batches said
        gradient = gradient.masked_fill(values.isnan(), torch.nan)
        self._multipliers, self._buffers = multiplier_step(
            multipliers,
            buffers,
            gradient,
            lr=self.lr,
            momentum=self.momentum,
            max_grad=self.max_grad,
            cap=self.cap,
        )

    # ---- stages -------------------------------------------------------------------------------------------

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Mix the advantages of task and rewards, then move the multipliers (in training only)."""
        everyone = rollout.everyone
        assert everyone is not None
        columns = self._columns(everyone.names)
        weights, task_weight = bounded_weights(self._state()[0], self._equality())
        alone = [_normalised(everyone.rewards[:, column], everyone) for column in columns]
        task = self._task(rollout, everyone, columns)
        signs = self._signs().to(task.device)
        mixed = mixed_advantages(
            task, torch.stack(alone, dim=1), weights.to(task.device), task_weight.to(task.device), signs
        )
        values = everyone.scored[:, columns].cpu().double().nanmean(dim=0)
        for name, value, weight in zip(self._names(), values, weights, strict=True):
            rollout.gauges.mean(f"value/{name}", value, ~value.isnan())
            rollout.gauges.mean(f"weight/{name}", weight)
        rollout.gauges.mean("task_weight", task_weight)
        if self.task == "beta":
            rows = rollout.mask.size(0)
            rollout.carry["constrained_task"] = mixed.new_full((rows,), task_weight.item())
        if rollout.training:
            self._update(values)
        idle = (mixed == 0).view(-1, everyone.group_size).all(dim=1)
        rollout.tied = rollout.local(idle.repeat_interleave(everyone.group_size))
        return rollout.local(mixed).to(rollout.advantages.dtype)

    def _columns(self, names: tuple[str, ...]) -> list[int]:
        for name in self._names():
            if names.count(name) != 1:
                raise ValueError(_wrong_name(name, names))
        return [names.index(name) for name in self._names()]

    def _task(self, rollout: Rollout, everyone: AllRows, columns: list[int]) -> torch.Tensor:
        """Return A_0, (N,) over all ranks."""
        rewards = everyone.rewards
        if self.task == "kl":
            old, ref = rollout.old_logps, rollout.ref_logps
            assert old is not None
            assert ref is not None
            drift = (old.float() - ref.float()).masked_fill(rollout.mask == 0, 0.0).sum(dim=1)
            score = -rollout.gather(drift.unsqueeze(1)).squeeze(1)
            # a row that no reward could judge stays out altogether
            return _normalised(score.masked_fill(rewards.isnan().all(dim=1), torch.nan), everyone)
        if self.task == "rewards":
            chosen = everyone.weights != 0
            chosen[columns] = False
            free, absent = rewards[:, chosen], rewards[:, chosen].isnan().all(dim=1)
            score = (free * everyone.weights[chosen]).nansum(dim=1).masked_fill(absent, torch.nan)
            return _normalised(score, everyone)
        return torch.zeros_like(rewards[:, 0])

    def kl_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Scale TRL's KL term by the task's weight, with ``task: beta``."""
        return tokens.carry["constrained_task"].unsqueeze(1) if self.task == "beta" else None

    # ---- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Multipliers, momentum and the window of measured rewards, by reward."""
        multipliers, buffers = self._state()
        return {
            "rewards": self._names(),
            "multipliers": multipliers.tolist(),
            "buffers": buffers.tolist(),
            "history": [values.tolist() for values in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: The checkpoint has other constraints.
        """
        if state.get("rewards") != self._names():
            raise ValueError(
                f"the checkpoint has constraints on {state.get('rewards')}, this run on {self._names()}: "
                "resume with the same constraints in the same order, or start a new run"
            )
        self._multipliers, self._buffers = (
            torch.tensor(state[key], dtype=torch.float64) for key in ("multipliers", "buffers")
        )
        self._history = [torch.tensor(values, dtype=torch.float64) for values in state["history"]]


def _wrong_name(name: str, names: tuple[str, ...]) -> str:
    if name in names:
        return f"two rewards are called {name!r}, so a constraint cannot tell them apart: rename one"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"there is no reward {name!r} to constrain{hint} The rewards are {', '.join(names)}"


def _normalised(values: torch.Tensor, everyone: AllRows) -> torch.Tensor:
    """Return the advantages of (N,) values; exactly 0 in a group whose values are equal."""
    grouped = values.view(-1, everyone.group_size)
    low = torch.where(grouped.isnan(), torch.inf, grouped).amin(dim=1)
    high = torch.where(grouped.isnan(), -torch.inf, grouped).amax(dim=1)
    constant = (low >= high).repeat_interleave(everyone.group_size)
    return everyone.normalise(values).masked_fill(constant, 0.0)
