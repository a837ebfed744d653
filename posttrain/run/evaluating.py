"""The evaluation of a run: on its held-out rows, judged by its first reward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, RewardConfig

from posttrain.config.schema import EvaluateConfig, RunConfig
from posttrain.config.tasks import TASKS
from posttrain.data.pairs import apply_pair_lengths
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.preference import Reference, evaluate_preferences, preference_settings
from posttrain.evaluation.results import Evaluation
from posttrain.evaluation.scoring import evaluate_scorer, scorer_settings
from posttrain.rewards.reward import Reward, VerifierFailure
from posttrain.run.directory import RunError
from posttrain.run.starting import start_model

CONTINUATION = 128
"""Tokens of a continuation in the evaluation of a preference run, unless evaluate.max_new_tokens says."""


def evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """Return everything that defines the numbers of an evaluation, as :class:`Evaluation` records it."""
    settings = config.evaluate or EvaluateConfig()
    if TASKS[config.task].scores:
        return scorer_settings(settings)
    if TASKS[config.task].pairs:
        return preference_settings(settings, completion_limit(config), **_pairs(config))
    return settings.model_dump(exclude={"before", "every"}) | {"max_new_tokens": completion_limit(config)}


def can_evaluate(config: RunConfig) -> bool:
    """Return whether there is something to measure: pairs, or a reward that judges."""
    return TASKS[config.task].pairs or bool(config.rewards)


def evaluate_model(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    reward: Reward | None,
    *,
    reference: Reference | None = None,
    start: Evaluation | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate ``model`` on rendered held-out rows, with bars on a terminal if ``progress``.

    Args:
        config: The run.
        model: The model of its task.
        tokenizer: Its tokenizer.
        rows: Rendered held-out rows.
        reward: What judges; may be None for tasks on pairs.
        reference: The start of a preference run; None when ``model`` is the start.
        start: The evaluation of that start, if there is one.
        progress: Whether to show bars.

    Raises:
        VerifierFailure: The verifier failed on more completions than ``max_failures`` of the reward allows,
            so that the numbers would say nothing about the model.
    """
    model, settings = model.to(PartialState().device), config.evaluate or EvaluateConfig()
    if TASKS[config.task].scores:
        return evaluate_scorer(model, tokenizer, rows, settings)
    if TASKS[config.task].pairs:
        result = evaluate_preferences(
            model,
            tokenizer,
            rows,
            settings,
            reference=reference,
            max_new_tokens=completion_limit(config),
            verify=None if reward is None else reward.verify,
            start=start,
            progress=progress,
            **_pairs(config),
        )
    else:
        assert reward is not None
        result = evaluate(
            model,
            tokenizer,
            rows,
            reward.verify,
            settings,
            max_new_tokens=completion_limit(config),
            progress=progress,
        )
    if reward is not None:
        _refuse_failing(result, reward)
    return result


def reference_of(config: RunConfig, model: Any = None, tokenizer: Any = None) -> Reference:
    """Return what gives the start of a preference run.

    Args:
        config: The run.
        model: The trained model of this run, if its adapter can be switched off to get the start.
        tokenizer: Of what is compared with the start, where that may be another run's.

    Raises:
        posttrain.run.directory.RunError: On entering: the two have different vocabularies.
    """

    @contextlib.contextmanager
    def give() -> Iterator[Any]:
        if config.model.adapter is not None and isinstance(model, PeftModel):
            with model.disable_adapter():
                yield model
            return
        start, own = start_model(config, int(config.trainer.get("seed", 42)))
        if tokenizer is not None:
            _refuse_other_vocabulary(
                own.get_vocab(), tokenizer.get_vocab(), config.model.path, tokenizer.name_or_path
            )
        yield start.to(PartialState().device)

    return give


def _refuse_other_vocabulary(
    start: Mapping[str, int], policy: Mapping[str, int], path: str, name: str
) -> None:
    """Refuse log-ratios between models whose tokens are not the same; one may have a few more."""
    same, smaller = len(start.items() & policy.items()), min(len(start), len(policy))
    if same < smaller:
        raise RunError(
            f"{name or 'the model'} ({len(policy)} tokens) cannot be compared with {path} ({len(start)} "
            f"tokens), the start that the configuration names: of {smaller} tokens {same} are the same in "
            "both vocabularies. Set model.path to what the model was trained from"
        )


def fitting_pairs(config: RunConfig, rows: Dataset, model: Any, tokenizer: Any) -> tuple[Dataset, str, int]:
    """Return the rendered pairs that can be trained on, counts in words, and the longest prompt in tokens.

    Raises:
        posttrain.data.DataError: See :func:`posttrain.data.pairs.apply_pair_lengths`.
    """
    kind = RewardConfig if TASKS[config.task].scores else DPOConfig
    return apply_pair_lengths(
        rows,
        tokenizer,
        config.trainer.get("max_length", kind.max_length),
        config.data.over_length,
        whole=TASKS[config.task].scores,
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )


def check_context(config: RunConfig, model: Any, longest: int) -> None:
    """Refuse, before anything is computed, held-out prompts that leave no room for their completions.

    Args:
        config: The run.
        model: Knows its context, in tokens; some have none.
        longest: Tokens of the longest held-out prompt.

    Raises:
        RunError: They do not fit together.
    """
    if TASKS[config.task].scores:
        return
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + completion_limit(config) > context:
        raise RunError(
            f"the evaluation does not fit the model: its longest prompt has {longest} tokens, and with "
            f"{completion_limit(config)} new ones it exceeds the context of {context}. Set "
            f"evaluate.max_new_tokens to at most {max(context - longest, 0)}, or leave out longer prompts "
            "with data.max_prompt_tokens and data.over_length=filter"
        )


def completion_limit(config: RunConfig) -> int:
    """Return the longest sampled completion of an evaluation, in tokens."""
    limit = config.evaluate.max_new_tokens if config.evaluate else None
    default = CONTINUATION if TASKS[config.task].pairs else 512
    return int(limit or config.trainer.get("max_completion_length") or default)


def _pairs(config: RunConfig) -> dict[str, Any]:
    """Return what the trainer of a preference run works with."""
    return {
        "beta": float(config.trainer.get("beta", DPOConfig.beta)),
        "max_length": config.trainer.get("max_length", DPOConfig.max_length),
    }


def _refuse_failing(result: Evaluation, reward: Reward) -> None:
    errors, timeouts = result.verdicts["error"], result.verdicts["timeout"]
    total = sum(result.verdicts.values())
    if errors + timeouts <= reward.config.max_failures * total:
        return
    samples = (sample for problem in result.problems for sample in problem.samples)
    first = next(sample for sample in samples if sample.status in ("error", "timeout"))
    raise VerifierFailure(
        f"reward {reward.__name__!r}: {errors + timeouts} of {total} held-out completions ended in error "
        f"({errors}) or timeout ({timeouts}); at most {reward.config.max_failures:.0%} may (max_failures). "
        f"The verifier is at fault, not the model. First, for the completion {first.text[:80]!r}: "
        f"{first.message}. "
        "Fix the verifier, or raise its deadline, workers or params.memory_gib."
    )
