"""The evaluation of a run: on its held-out rows, judged by its first reward."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from datasets import Dataset

from posttrain.config.schema import EvaluateConfig, RunConfig
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.results import Evaluation
from posttrain.rewards.reward import Reward, VerifierFailure
from posttrain.run.directory import RunError


def evaluation_settings(config: RunConfig) -> dict[str, Any]:
    """Return everything that defines the numbers of an evaluation, as :class:`Evaluation` records it."""
    settings = config.evaluate or EvaluateConfig()
    return settings.model_dump(exclude={"before", "every"}) | {"max_new_tokens": _limit(config)}


def evaluate_model(
    config: RunConfig, model: Any, tokenizer: Any, rows: Dataset, reward: Reward, *, progress: bool = True
) -> Evaluation:
    """Evaluate ``model`` on rendered held-out rows, with bars on a terminal if ``progress``.

    Raises:
        VerifierFailure: The verifier failed on more completions than ``max_failures`` of the reward allows,
            so that the numbers would say nothing about the model.
    """
    result = evaluate(
        model.to(PartialState().device),
        tokenizer,
        rows,
        reward.verify,
        config.evaluate or EvaluateConfig(),
        max_new_tokens=_limit(config),
        progress=progress,
    )
    _refuse_failing(result, reward)
    return result


def check_context(config: RunConfig, model: Any, longest: int) -> None:
    """Refuse, before anything is computed, held-out prompts that leave no room for their completions.

    Args:
        config: The run.
        model: Knows its context, in tokens; some have none.
        longest: Tokens of the longest held-out prompt.

    Raises:
        RunError: They do not fit together.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + _limit(config) > context:
        raise RunError(
            f"the evaluation does not fit the model: its longest prompt has {longest} tokens, and with "
            f"{_limit(config)} new ones it exceeds the context of {context}. Set evaluate.max_new_tokens to "
            f"at most {max(context - longest, 0)}, or leave out longer prompts with data.max_prompt_tokens "
            "and data.over_length=filter"
        )


def _limit(config: RunConfig) -> int:
    limit = config.evaluate.max_new_tokens if config.evaluate else None
    return int(limit or config.trainer.get("max_completion_length") or 512)


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
