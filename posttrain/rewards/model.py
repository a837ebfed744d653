"""``rewards: ["model:PATH"]``: a trained reward model as a reward and as a judge.

PATH is a run of ``task: reward``, a folder with a reward model or its adapter, or a Hub id. The score is the
model's own number, without scale or bound: differences mean something, the level does not. Nothing here
imports torch before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.config.schema import RewardConfig
from posttrain.rewards.registry import ParameterError, VerifierSpec
from posttrain.rewards.reward import MODEL_PREFIX, Reward
from posttrain.rewards.verdict import Verdict

NAME = "model"


class ModelRewardParams(BaseModel):
    """Parameters of a reward model in the ``rewards`` section."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    batch_size: int = Field(default=32, ge=1, description="Texts scored together.")
    max_length: int | None = Field(
        default=None, ge=1, description="Longest text in tokens; the context of the model when unset."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights."
    )
    base: str | None = Field(
        default=None, description="Base of an adapter, where the recorded one has moved."
    )
    threshold: float | None = Field(
        default=None,
        description="Score from which an answer counts as correct in evaluations; none does when unset.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python shipped with the checkpoint.")


class ModelReward(Reward):
    """A reward function in TRL's sense, backed by a reward model in this process.

    The model is in evaluation mode, without gradients, on the device of the run. A text is the prompt with
    the completion, as ``posttrain.RewardTrainer`` trains on it: with the reward model's own tokenizer,
    its chat template for messages, and the end token behind plain text. A text that is longer than the model
    takes, or a score that is not finite, is an error and no score: the trainer leaves such rows out.

    Args:
        path: Run directory, folder or Hub id; or a loaded model with one label.
        tokenizer: Of a loaded model.
        config: The entry under ``rewards:``; its weight and ``max_failures`` count.
        **params: Fields of :class:`ModelRewardParams`.

    Raises:
        posttrain.models.load.ModelLoadError: It is no trained reward model, or cannot be loaded.
        ParameterError: A parameter it does not take.
    """

    def __init__(
        self,
        path: str | Path | Any,
        tokenizer: Any = None,
        *,
        config: RewardConfig | None = None,
        name: str = NAME,
        **params: Any,
    ) -> None:
        self.__name__ = name
        self.params = check_params(params)
        self.config = config or RewardConfig(name=f"{MODEL_PREFIX}{path if tokenizer is None else NAME}")
        self.spec = VerifierSpec(self.config.name, dict(params))
        self.weight = self.config.weight
        self.verdicts: list[Verdict] = []
        model: Any = path
        if tokenizer is None:
            model, tokenizer = _load(str(path), self.params)
        from accelerate import PartialState

        self.model = model.to(PartialState().device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (self.params.max_length, context) if limit is not None]
        self.limit: int | None = min(limits, default=None)

    def wait_ready(self) -> None:
        """Do nothing: the model is there."""

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        """Return one number per completion; None for a text that is too long.

        Args:
            prompts: Texts or lists of messages.
            completions: Texts or lists of messages.
        """
        from posttrain.data.pairs import encode_scored
        from posttrain.evaluation.scoring import text_scores

        encoded = [
            encode_scored(self.tokenizer, prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        found: list[float | None] = [None] * len(encoded)
        fit = [index for index, ids in enumerate(encoded) if self.limit is None or len(ids) <= self.limit]
        texts, pad = [encoded[index] for index in fit], self.tokenizer.pad_token_id
        scores = text_scores(self.model, texts, pad=pad, batch_size=self.params.batch_size)
        for index, score in zip(fit, scores, strict=True):
            found[index] = score
        return found

    def verify(self, completions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """Judge completions (texts or messages) against rows that hold their ``prompt``."""
        scores = self.scores([row["prompt"] for row in rows], completions)
        return [self._verdict(score) for score in scores]

    def _verdict(self, score: float | None) -> Verdict:
        if score is None:
            return Verdict("error", message=f"longer than the {self.limit} tokens the reward model takes")
        if not math.isfinite(score):
            return Verdict("error", message=f"the reward model gives {score}")
        threshold = self.params.threshold
        correct = threshold is not None and score >= threshold
        return Verdict("correct" if correct else "wrong", score, None, f"score {score:.4g}")


def check_params(params: Mapping[str, Any]) -> ModelRewardParams:
    """Return the parameters, checked.

    Raises:
        ParameterError: Names or values that are not taken, all of them.
    """
    try:
        return ModelRewardParams(**params)
    except ValidationError as error:
        known = ", ".join(ModelRewardParams.model_fields)
        problems = []
        for item in error.errors():
            name = str(item["loc"][0])
            if item["type"] == "extra_forbidden":
                problems.append((name, f"there is no parameter {name!r}; there are: {known}"))
            else:
                problems.append((name, f"{name}: {item['msg']}, found {item['input']!r}"))
        raise ParameterError(NAME, problems) from None


def _load(path: str, params: ModelRewardParams) -> tuple[Any, Any]:
    from posttrain.models.scoring import load_scorer
    from posttrain.run.verbs import base_of, model_of

    folder = model_of(path)
    base = params.base or base_of(folder)
    return load_scorer(folder, params.dtype, base=base, trust_remote_code=params.trust_remote_code)
