"""What TRL keeps of a generation: its batch, its texts, its metrics and its table of completions."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from trl import GRPOTrainer as TRLGRPOTrainer


class BatchSeams(TRLGRPOTrainer):
    """Reads and corrects what a generation left behind."""

    # What TRL's annotations leave open: they are those of transformers' Trainer.
    args: Any  # a GRPOConfig; its fields are typed for the command line, not for what __post_init__ leaves
    model: Any
    ref_model: Any
    _logs: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    #: Completions, their ids and the prompts of the latest call of the reward functions.
    _scored: tuple[Any, Any, Any] = ([], [], [])

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``, as TRL decides it."""
        return "train" if self.model.training else "eval"

    @property
    def off_policy(self) -> bool:
        """Whether rollouts are used after the policy has moved, so that TRL keeps old log-probs."""
        every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % every != 0

    @property
    def group_size(self) -> int:
        """Completions per prompt in the current mode."""
        return self.num_generations if self.mode == "train" else self.num_generations_eval

    def loss_mask(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, C), 1 on tokens written by the model."""
        mask = batch["completion_mask"]
        return mask if "tool_mask" not in batch else mask * batch["tool_mask"]

    def texts_of(self, batch: dict[str, Any]) -> list[str]:
        """Return this rank's completions of a generation batch as text, without special tokens."""
        ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
        rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        return list(self._tokenizer.batch_decode(rows, skip_special_tokens=True))

    def scored_completions(self) -> tuple[list[Any], list[bool], list[Any]]:
        """Return this rank's completions in the reward stage, which ones were cut, and their prompts."""
        completions, ids, prompts = self._scored
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        return list(completions), [not row or row[-1] not in ends for row in ids], list(prompts)

    def last_completions(self) -> list[dict[str, Any]]:
        """Return the latest generation batch of all ranks as rows, newest last."""
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        extra = {name: list(values) for name, values in self._logs["extra"].items()}
        rows = []
        for i, (prompt, completion, advantage) in enumerate(
            zip(self._logs["prompt"], self._logs["completion"], self._logs["advantages"], strict=True)
        ):
            row = {"prompt": prompt, "completion": completion, "advantage": advantage}
            row["rewards"] = {name: values[i] for name, values in rewards.items()}
            row.update({name: values[i] for name, values in extra.items() if i < len(values)})
            rows.append(row)
        return rows

    def log_advantages(self, advantages: torch.Tensor) -> None:
        """Correct the advantages of the latest generation batch (all ranks) in the table of completions."""
        log = self._logs["advantages"]
        for _ in range(min(len(log), advantages.numel())):
            log.pop()
        log.extend(advantages.tolist())

    # ---- the log ----------------------------------------------------------------------------------------

    def log_numbers(self, means: Mapping[str, float], maxima: Mapping[str, float]) -> None:
        """Add numbers to TRL's metrics of the current mode."""
        metrics = self._metrics[self.mode]
        for name, value in means.items():
            metrics[name].append(value)
        for name, value in maxima.items():
            # TRL logs the mean of a list: one entry, so that the log shows the largest since the last one
            metrics[name] = [max([value, *metrics[name]])]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Put TRL's metrics and its table of completions back afterwards; only the token count goes on."""
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}
        columns = {key: list(column) for key, column in self.log_columns().items()}
        try:
            yield
        finally:
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]
            self._metrics["train"] = defaultdict(list, metrics)
            for key, column in self.log_columns().items():
                column.clear()
                column.extend(columns.get(key, []))

    def log_columns(self) -> dict[tuple[str, ...], Any]:
        """Return the columns of the table of completions by name."""
        columns: dict[tuple[str, ...], Any] = {
            (name,): self._logs[name] for name in ("prompt", "completion", "advantages")
        }
        for table in ("rewards", "extra"):
            columns.update({(table, name): column for name, column in self._logs[table].items()})
        return columns

    def log_replaced(
        self, log: dict[tuple[str, ...], list[Any]], replaced: dict[int, int], rows: int
    ) -> None:
        """Put rows of another generation into the table of completions, as :meth:`replace_rows` does."""
        for key, column in self.log_columns().items():
            values = list(column)
            start = len(values) - rows
            if start < 0 or key not in log:
                continue  # a column that not every generation filled
            for row, other in replaced.items():
                values[start + row] = log[key][other]
            column.clear()
            column.extend(values)
