"""More rollouts than TRL makes: dead groups replaced by others, rows sampled at another temperature.

Further generations go through the whole of TRL's generation and scoring, so their masks, log-probabilities,
sampler corrections and rewards are made like those of the first. What TRL logs meanwhile is put back: its
metrics describe the first generation, an unselected sample of the policy on the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from posttrain.rl.gauges import Gauges
from posttrain.rl.method import Extra, Method, Refill
from posttrain.rl.rows import CARRY, Batch, gather_batch, join_rows, kept_share, take_rows
from posttrain.rl.seams import GRPOSeams


def prompt_key(row: dict[str, Any]) -> str:
    """Return what makes two input rows the same prompt."""
    return repr(row.get("prompt"))


class PromptOrder:
    """An endless seeded order of the training prompts, each once per pass; its place is one number."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.position = 0
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)

    def next(self) -> int:
        """Return the next row of the data set."""
        number, place = divmod(self.position, self.rows)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(number + 1):
                self._order = torch.randperm(self.rows, generator=generator)
            self._pass = number
        self.position += 1
        return int(self._order[place])


@dataclass
class Generated:
    """Whole groups generated beside the generation batch, the rows of all ranks, the same on every rank.

    Attributes:
        batch: Row-shaped tensors, n rows.
        rewards: (n, F) as methods reshaped them.
        outcomes: (n, F) as the verifiers gave them.
        log: TRL's table of completions for these rows, by column.
        prompts: One input row per group.
    """

    batch: Batch
    rewards: torch.Tensor
    outcomes: torch.Tensor
    log: dict[tuple[str, ...], list[Any]]
    prompts: list[dict[str, Any]]

    @property
    def tokens(self) -> torch.Tensor:
        """(n,) tokens written by the model that count in the loss."""
        mask = self.batch["completion_mask"]
        return (mask * self.batch["tool_mask"] if "tool_mask" in self.batch else mask).sum(dim=1)


class MoreRollouts(GRPOSeams):
    """Mixin with the row operations on generation batches."""

    #: The verifiers' matrix of the latest generation, before methods reshape it.
    outcomes: torch.Tensor
    #: Set by the subclass.
    _active: tuple[Method, ...]
    _gauges: Gauges
    train_dataset: Any

    _prompt_order: PromptOrder | None = None
    #: Whether a second generation for prompts of the batch is under way.
    _again = False
    #: (groups,) bool of the latest generation batch, refused and not replaced.
    _dead: torch.Tensor | None = None
    #: (rows, functions) rewards of everything that was generated for it.
    _really_done: torch.Tensor | None = None

    def refuse_late(self) -> None:
        """Refuse what only the built trainer knows.

        Raises:
            ValueError: A method asks for what this run cannot give.
        """
        skipping = [m.name for m in self._active if type(m).live_rows is not Method.live_rows]
        if skipping and self.aux_loss_enabled:
            raise ValueError(
                f"{skipping[0]} leaves rows out of the forward, but the router loss of a mixture of experts "
                "depends on them: set router_aux_loss_coef to 0, or drop the method"
            )
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        split = self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        if self.corrects_truncation and split:
            raise ValueError(
                "the loss of truncated sampling needs the gradient of the LM head, which is sharded here "
                "(FSDP, DeepSpeed ZeRO-3): use ZeRO-2 or plain data parallelism, leave top_p, top_k and "
                "min_p out, or set rollout.truncated_sampling: accept"
            )
        refilling = [m.name for m in self._active if m.refill_rounds]
        if refilling and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"{refilling[0]} draws other prompts by their number, which a streamed data set does not "
                "have: load it without streaming, or drop the method"
            )
        planning = [m.name for m in self._active if m.samples_otherwise]
        if len(planning) > 1:
            raise ValueError(f"one method may ask for extra rows, found {' and '.join(planning)}: keep one")
        if planning and self.rollout_func is not None:
            raise ValueError(
                f"{planning[0]} samples at a temperature of its own, which a rollout_func does not know of: "
                "drop either"
            )

    # ---- stages -----------------------------------------------------------------------------------------

    def on_generated(self, inputs: Any, batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        """Refill stage, the stages of :meth:`on_rollout`, then the stage of extra rows."""
        self._dead = self._really_done = None
        if self.mode != "train":
            return self.on_rollout(self.scored(batch), rewards)
        rounds = max((method.refill_rounds for method in self._active), default=0)
        plans = [(m, plan) for m in self._active if (plan := m.plan_extra()) is not None]
        prompts = self.group_prompts(inputs) if rounds or plans else []
        if rounds:
            batch, rewards = self._refill(batch, rewards, prompts, rounds)
        batch = self.on_rollout(self.scored(batch), rewards)
        for method, plan in plans:
            steps = 1 if plan.replace else self.args.steps_per_generation
            wanted = self.even_groups(max(1, math.ceil(plan.prompts * len(prompts))), steps)
            self._again = True
            try:
                with self.generation_temperature(plan.temperature * self.temperature):
                    generated = self.generate_groups(prompts[:wanted])
            finally:
                self._again = False
            batch = self._admit(method, generated, batch, replace=plan.replace)
        return batch

    def _refill(
        self, batch: Batch, rewards: torch.Tensor, prompts: list[dict[str, Any]], rounds: int
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Put groups of other prompts in the places of dead ones; ``prompts`` follows."""
        self._log_gauges()  # of the first generation; those of the others are dropped
        size, outcomes = self.group_size, self.outcomes
        dead = self._dead_groups(outcomes)
        left, done = dead.clone(), [rewards]
        seen = {prompt_key(row) for row in prompts}
        count, made, tokens = 0, 0, 0
        while left.any() and count < rounds:
            missing = left.nonzero().flatten().tolist()
            drawn = self.draw_prompts(self.even_groups(len(missing)), seen)
            if not drawn:
                break
            fresh = self.generate_groups(drawn, score=False)
            count, made = count + 1, made + len(fresh.rewards)
            tokens += int(fresh.tokens.sum())
            done.append(fresh.rewards)
            useful = (~self._dead_groups(fresh.outcomes)).nonzero().flatten().tolist()
            pairs = list(zip(missing, useful, strict=False))  # what is too many or too few stays as it is
            if not pairs:
                continue
            left[[place for place, _ in pairs]] = False
            places = {place * size + i: new * size + i for place, new in pairs for i in range(size)}
            batch = self.replace_rows(batch, fresh.batch, places)
            self.log_replaced(fresh.log, places, len(rewards))
            rewards = rewards.clone()
            rewards[list(places)] = fresh.rewards[list(places.values())]
            for place, new in pairs:
                prompts[place] = drawn[new]
        if not torch.equal(left, dead):
            advantages = self.advantages_of(rewards, size)
            self.log_advantages(advantages)
            local = advantages.view(self.accelerator.num_processes, -1)[self.accelerator.process_index]
            batch["advantages"] = local
        self._dead, self._really_done = left, torch.cat(done)
        refill = Refill(
            outcomes.view(len(dead), size, -1),
            dead,
            left,
            count,
            made,
            tokens,
            names=tuple(self.reward_func_names),
            gauges=self._gauges,
        )
        for method in self._active:
            self._gauges.enter(method.name)
            method.refilled(refill)
        return batch, rewards

    def _dead_groups(self, outcomes: torch.Tensor) -> torch.Tensor:
        """(groups,) bool, refused by any method."""
        grouped = outcomes.view(-1, self.group_size, outcomes.size(1))
        dead = torch.zeros(len(grouped), dtype=torch.bool, device=outcomes.device)
        for method in self._active:
            refused = method.dead_groups(grouped, tuple(self.reward_func_names))
            if refused is not None:
                dead |= refused
        return dead

    def _admit(
        self, method: Method, generated: Generated, batch: dict[str, Any], *, replace: bool
    ) -> dict[str, Any]:
        """Put rows of a second generation into the batch, out of reach for every other method."""
        rows = len(batch["prompt_ids"]) * self.accelerator.num_processes
        self._gauges.enter(method.name)
        extra = Extra(
            rewards=generated.outcomes,
            advantages=generated.batch["advantages"],
            tokens=generated.tokens,
            names=tuple(self.reward_func_names),
            rows=rows,
            gauges=self._gauges,
        )
        admission = method.admit(extra)
        self._log_gauges()
        others = take_rows(generated.batch, admission.rows)
        weight, one = admission.weight, torch.ones_like(admission.advantages)
        others["advantages"] = admission.advantages * weight
        others[f"{CARRY}reward"] = self._total(generated.rewards)[admission.rows]
        others[f"{CARRY}extra"], others[f"{CARRY}weight"] = one.bool(), one * weight
        if "importance_sampling_ratio" in others:
            # the correction for the sampler would undo the temperature, or throw the rows out
            others["importance_sampling_ratio"] = torch.ones_like(others["importance_sampling_ratio"])
        batch = dict(batch)
        main = admission.main_weight
        batch["advantages"] = batch["advantages"] * main
        ones = torch.ones_like(batch[f"{CARRY}reward"])
        batch[f"{CARRY}extra"], batch[f"{CARRY}weight"] = ~ones.bool(), ones * main
        if not replace:
            return self.append_rows(batch, others)
        return self.replace_rows(batch, others, {i: i for i in range(min(len(admission.rows), rows))})

    def on_micro_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Leave rows out that a method knows to have no gradient; every rank keeps equally many."""
        mask = self.loss_mask(batch)
        if self.mode != "train":
            return batch, 1.0
        answers = {m.name: m.live_rows(batch["advantages"], mask) for m in self._active}
        masks = {name: live for name, live in answers.items() if live is not None}
        if not masks:
            return batch, 1.0
        live = torch.stack(list(masks.values())).all(dim=0)
        # TRL gathers numbers per row, and a sharded model needs a forward on every rank: one row at least
        count = self._widest(max(int(live.sum()), 1))
        # shortest first among the rows that fill up
        order = torch.argsort(torch.where(live, -1, mask.sum(dim=1)), stable=True)
        rows = order[:count].sort().values
        kept = take_rows(batch, rows)
        self._gauges.enter(next(iter(masks)))
        self._gauges.mean("live_share", live)
        share = kept_share(self.loss_type, count, len(live), self.loss_mask(kept).sum(), mask.sum())
        return kept, share

    def _total(self, rewards: torch.Tensor) -> torch.Tensor:
        """(N,) TRL's weighted sum of an (N, F) matrix, NaN for a row that no function scored."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    # ---- rows -------------------------------------------------------------------------------------------

    def select_rows(self, batch: Batch, rows: torch.Tensor) -> Batch:
        """Return a generation batch with some of this rank's rows, and the number of active tokens to match.

        Args:
            batch: What ``_generate_and_score_completions`` returned.
            rows: (n,) indices; the same number on every rank. Collective.

        Raises:
            ValueError: The batch holds images, whose tensors are not row-shaped.
        """
        chosen = take_rows(batch, rows)
        chosen["num_items_in_batch"] = self.accelerator.gather(self.loss_mask(chosen).sum()).sum()
        return chosen

    def replace_rows(self, batch: Batch, others: Batch, replaced: dict[int, int]) -> Batch:
        """Return the generation batch with rows replaced. Collective.

        Args:
            batch: This rank's rows.
            others: Rows to put in, the same on every rank.
            replaced: Row over all ranks to row of ``others``.
        """
        rows = len(batch["prompt_ids"])
        first = self.accelerator.process_index * rows
        index = [rows + replaced[first + i] if first + i in replaced else i for i in range(rows)]
        joined = join_rows(batch, others, self._tokenizer.pad_token_id)
        return self.select_rows(joined, torch.tensor(index))

    def append_rows(self, batch: Batch, others: Batch) -> Batch:
        """Return the generation batch with this rank's share of ``others`` behind it. Collective.

        Args:
            batch: This rank's rows.
            others: Rows to add, the same on every rank, as many as can be dealt out evenly.
        """
        ranks, rows = self.accelerator.num_processes, len(batch["prompt_ids"])
        share = len(others["prompt_ids"]) // ranks
        mine = torch.arange(share) + rows + share * self.accelerator.process_index
        joined = join_rows(batch, others, self._tokenizer.pad_token_id)
        return self.select_rows(joined, torch.cat([torch.arange(rows), mine]))

    # ---- generating beside the generation batch ---------------------------------------------------------

    def group_prompts(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one input row per group of all ranks, in order. Collective."""
        first = self.accelerator.process_index * len(inputs)
        heads = [dict(row) for i, row in enumerate(inputs) if (first + i) % self.group_size == 0]
        return gather_object(heads) if self.accelerator.num_processes > 1 else heads

    def even_groups(self, wanted: int, steps: int = 1) -> int:
        """Return the smallest number of groups, at least ``wanted``, that ranks and steps share evenly."""
        parts = self.accelerator.num_processes * steps
        unit = parts // math.gcd(parts, self.group_size)
        return -(-wanted // unit) * unit

    @property
    def rows_may_go(self) -> bool:
        """A refill throws dead groups away."""
        return self.mode == "train" and any(method.refill_rounds for method in self._active)

    def generate_groups(self, prompts: list[dict[str, Any]], *, score: bool = True) -> Generated:
        """Generate and verify one group for each prompt. Collective: one generation call on every rank.

        Args:
            prompts: Input rows, the same on every rank, as many as :meth:`even_groups` allows.
            score: Also the log-probabilities that the loss and methods need; else they are missing or NaN,
                for :meth:`~posttrain.rl.seams.GRPOSeams.scored` after rows have been thrown away.
        """
        rows = [dict(row) for row in prompts for _ in range(self.group_size)]
        share = len(rows) // self.accelerator.num_processes
        mine = rows[share * self.accelerator.process_index :][:share]
        with self.aside():
            batch = self.raw_rollout(mine)
            if score:
                batch = self.scored(batch)
            assert self._gathered_rewards is not None
            rewards, outcomes = self._gathered_rewards, self.outcomes
            log = {key: list(column)[-len(rows) :] for key, column in self.log_columns().items()}
        self._gauges.flush(self.accelerator)
        gathered = gather_batch(
            batch, self._tokenizer.pad_token_id, self._widest, lambda values: self.accelerator.gather(values)
        )
        return Generated(gathered, rewards, outcomes, log, prompts)

    def _widest(self, width: int) -> int:
        if self.accelerator.num_processes == 1:
            return width
        here = torch.tensor([width], device=self.accelerator.device)
        return int(self.accelerator.gather(here).max())

    # ---- prompts ----------------------------------------------------------------------------------------

    def draw_prompts(self, wanted: int, seen: set[str]) -> list[dict[str, Any]]:
        """Return rows of the training set whose prompts are not in ``seen``, which grows by them.

        Args:
            wanted: How many; fewer are returned when the training set has no more, or when the last ones
                cannot be shared evenly between ranks. The same on every rank.
            seen: Prompts as :func:`prompt_key` gives them.
        """
        order, data = self.prompt_order, self.input_rows
        drawn: list[dict[str, Any]] = []
        for _ in range(order.rows):
            if len(drawn) == wanted:
                break
            row = dict(data[order.next()])
            if prompt_key(row) not in seen:
                seen.add(prompt_key(row))
                drawn.append(row)
        even = self.even_groups(len(drawn))
        return drawn if even == len(drawn) else drawn[: even - self.even_groups(1)]

    @property
    def prompt_order(self) -> PromptOrder:
        """The order in which further prompts are drawn."""
        if self._prompt_order is None:
            # another order than the sampler's, or the first refill would draw the prompts of the next batch
            self._prompt_order = PromptOrder(len(self.train_dataset), self.args.seed + 1_000_003)
        return self._prompt_order

    def _log_gauges(self) -> None:
        self.log_numbers(*self._gauges.flush(self.accelerator))
