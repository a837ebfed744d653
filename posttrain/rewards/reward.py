"""Rewards for the trainer and the evaluation, built from the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import DataConfig, RewardConfig
from posttrain.rewards.pool import VerifierPool
from posttrain.rewards.registry import FUNCTION_PREFIX, VERIFIERS, ParameterError, VerifierSpec, check
from posttrain.rewards.soft_overlong import TOKENS
from posttrain.rewards.verdict import STATUSES, Verdict

if TYPE_CHECKING:
    from posttrain.data.load import LoadedData

GENERATED = "reasoning_gym:"
MODEL_PREFIX = "model:"
NAMED_SAMPLES = 5
DEFAULT_MEMORY_GIB = 4.0


class VerifierFailure(RuntimeError):
    """Too many rows of a batch ended in error or timeout: the verifier is broken, not the model."""


class Reward:
    """A reward function in TRL's sense, backed by verifier processes.

    Calling it gives one number per completion: the verifier's score, ``config.unparseable`` for an answer
    that could not be read, and None for error, timeout and skipped, so that nothing becomes 0 by accident.

    Attributes:
        weight: Weight in the sum of rewards.
        verdicts: The verdicts of the last call, one per completion.
        failed: Per completion of the last call, whether it ended in error or timeout; the trainer leaves
            those rows out altogether, whatever other rewards say.
    """

    def __init__(self, name: str, config: RewardConfig, spec: VerifierSpec, memory_gib: float | None) -> None:
        self.__name__ = name
        self.config = config
        self.spec = spec
        self.weight = config.weight
        self.verdicts: list[Verdict] = []
        self.pool = VerifierPool(
            spec, deadline=config.deadline, workers=config.workers, memory_gib=memory_gib
        )

    @property
    def failed(self) -> list[bool]:
        """Which rows of the last call ended in error or timeout."""
        return [verdict.failed for verdict in self.verdicts]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        trainer_state: Any = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Score a batch. ``columns`` are the data columns, one value per completion.

        Raises:
            VerifierFailure: More than ``max_failures`` of the batch ended in error or timeout. ``verdicts``
                and the logs are written before.
        """
        del trainer_state
        columns.pop("environments", None)
        if completion_ids is not None and not self.spec.is_function:
            columns[TOKENS] = [len(ids) for ids in completion_ids]
        rows = [
            {"prompt": prompt} | {name: values[index] for name, values in columns.items()}
            for index, prompt in enumerate(prompts)
        ]
        self.verdicts = self.verify(completions, rows)
        counts = Counter(verdict.status for verdict in self.verdicts)
        if log_metric is not None and self.verdicts:
            for status in STATUSES:
                if status != "skipped" or self.spec.is_function:
                    log_metric(f"verifier/{self.__name__}/{status}", counts[status] / len(self.verdicts))
        if log_extra is not None:
            log_extra(f"{self.__name__}_status", [verdict.status for verdict in self.verdicts])
        self._stop_if_broken(rows)
        return [self._value(verdict) for verdict in self.verdicts]

    def verify(self, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge completions (texts or lists of messages) against data rows; nothing is logged or refused."""
        if not self.spec.is_function:
            completions = [completion_text(completion) for completion in completions]
        return self.pool.verify(completions, rows)

    def wait_ready(self) -> None:
        """Wait until its processes have loaded the verifier.

        Raises:
            VerifierStartError: One could not.
        """
        self.pool.wait_ready()

    def close(self) -> None:
        """End the verifier processes."""
        self.pool.close()

    def _value(self, verdict: Verdict) -> float | None:
        return self.config.unparseable if verdict.status == "unparseable" else verdict.score

    def _stop_if_broken(self, rows: Sequence[Mapping[str, Any]]) -> None:
        broken = [index for index, verdict in enumerate(self.verdicts) if verdict.failed]
        if len(broken) <= self.config.max_failures * len(self.verdicts):
            return
        counts = Counter(self.verdicts[index].status for index in broken)
        lines = [
            f"reward {self.__name__!r}: {len(broken)} of {len(self.verdicts)} completions ended in error "
            f"({counts['error']}) or timeout ({counts['timeout']}); "
            f"at most {self.config.max_failures:.0%} may (max_failures). The verifier is at "
            "fault, not the model. Slowest first:"
        ]
        slowest = sorted(broken, key=lambda index: -(self.verdicts[index].seconds or 0.0))
        for index in slowest[:NAMED_SAMPLES]:
            verdict = self.verdicts[index]
            prompt = repr(rows[index]["prompt"])
            lines.append(
                f"  row {index}, {verdict.seconds or 0:.2f} s, {verdict.status}: {verdict.message} "
                f"(prompt {prompt[:80]}{'...' if len(prompt) > 80 else ''})"
            )
        lines.append("Fix the verifier, or raise its deadline, workers or params.memory_gib.")
        raise VerifierFailure("\n".join(lines))


def build_rewards(configs: Sequence[RewardConfig], data: LoadedData | DataConfig) -> list[Reward]:
    """Start the rewards of a run and wait until their processes are ready.

    Args:
        configs: The ``rewards`` section. ``params.memory_gib`` is taken out of any reward's params: the
            address space of its processes in GiB, 4 by default, null for no limit.
        data: The loaded data, whose columns are then checked too, or the ``data`` section.

    Returns:
        One reward per entry. Names are ``verifier``, ``math`` ..., the function's own name, or ``model``; the
        second of a name is ``math_2``.

    Raises:
        ValueError: A reward does not fit the data or does not take its parameters, or a reward model cannot
            be loaded.
        VerifierStartError: A verifier cannot be loaded.
    """
    config = data if isinstance(data, DataConfig) else data.config
    planned = []
    for entry in configs:
        spec, memory = verifier_spec(entry, config)
        if not isinstance(data, DataConfig) and not entry.name.startswith(MODEL_PREFIX):
            _check_columns(spec, data)
        planned.append((entry, spec, memory))
    rewards: list[Reward] = []
    try:
        for name, (entry, spec, memory) in zip(reward_names(configs), planned, strict=True):
            if entry.name.startswith(MODEL_PREFIX):
                from posttrain.rewards.model import ModelReward

                path = entry.name.removeprefix(MODEL_PREFIX)
                rewards.append(ModelReward(path, config=entry, name=name, **entry.params))
            else:
                rewards.append(Reward(name, entry, spec, memory))
        for reward in rewards:  # all of them are starting already
            reward.wait_ready()
    except BaseException:
        for reward in rewards:
            reward.close()
        raise
    return rewards


def reward_names(configs: Sequence[RewardConfig]) -> list[str]:
    """Return what the rewards of a run are called in logs and in the parameters of methods.

    A verifier has its own name, a function its last part; the second of a name is ``NAME_2``.
    """
    seen: Counter[str] = Counter()
    names = []
    for entry in configs:
        name = entry.name.rpartition(".")[2] if entry.name.startswith(FUNCTION_PREFIX) else entry.name
        name = "model" if name.startswith(MODEL_PREFIX) else name
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def verifier_spec(config: RewardConfig, data: DataConfig) -> tuple[VerifierSpec, float | None]:
    """Return what a reward entry means for a data source, and the memory limit in GiB. Starts nothing.

    Raises:
        ValueError: ``verifier`` for a source that has none.
        ParameterError: Parameters it does not take, all of them.
    """
    params = dict(config.params)
    if config.name.startswith(MODEL_PREFIX):
        from posttrain.rewards.model import check_params

        check_params(params)
        return VerifierSpec(config.name, params), None
    problems: list[tuple[str, str]] = []
    memory = params.pop("memory_gib", DEFAULT_MEMORY_GIB)
    if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
        problems.append(("memory_gib", f"memory_gib must be a number > 0 or null, found {memory!r}"))
    name = config.name
    if name in ("verifier", "reasoning_gym"):
        if not data.source.startswith(GENERATED):
            choices = ", ".join(sorted(set(VERIFIERS) - {"reasoning_gym", "soft_overlong"}))
            raise ValueError(
                f"reward {name!r} is the source's own verifier, and {data.source!r} has none "
                f"(only reasoning_gym:TASK does). Choose one of {choices} or "
                f"{FUNCTION_PREFIX}package.module.function"
            )
        name = "reasoning_gym"
        for taken in ("task", "task_params"):
            if params.pop(taken, None) is not None:
                problems.append((taken, f"{taken!r} comes from data.source and data.params, remove it"))
        params |= {"task": data.source.removeprefix(GENERATED), "task_params": data.params}
    spec = VerifierSpec(name, params)
    try:
        check(spec)
    except ParameterError as error:
        problems += error.problems
    if problems:
        raise ParameterError(config.name, problems)
    return spec, memory


def completion_text(completion: Any) -> str:
    """Return the text of a completion: a string, or the last assistant message of a list of messages.

    Raises:
        TypeError: Neither of the two.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, (list, tuple)) and all(isinstance(message, Mapping) for message in completion):
        for message in reversed(completion):
            if message.get("role") == "assistant":
                content = message.get("content")
                if isinstance(content, list):
                    return "".join(part.get("text") or "" for part in content)
                return content or ""
        return ""
    raise TypeError(f"a completion must be text or a list of messages, found {type(completion).__name__}")


def _check_columns(spec: VerifierSpec, data: LoadedData) -> None:
    needed = spec.columns() or ()
    for split, dataset in (("train", data.train), ("eval", data.eval)):
        if dataset is None:
            continue
        absent = [name for name in needed if name not in dataset.column_names]
        if absent:
            raise ValueError(
                f"reward {spec.name!r} reads column {', '.join(map(repr, absent))}, which the {split} data "
                f"does not have (found: {', '.join(dataset.column_names)}). Rename with data.columns, for "
                f"example columns: {{{absent[0]}: {dataset.column_names[-1]}}}, or name another "
                "column in the params of the reward"
            )
