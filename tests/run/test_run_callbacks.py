"""The progress line, the guard at every save, and the judgement whether an evaluation means anything."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers.trainer_callback import TrainerControl, TrainerState

from posttrain.config.schema import EvaluateConfig, RewardConfig, RunConfig
from posttrain.evaluation.results import Problem, Sample, summarise
from posttrain.rewards.reward import VerifierFailure
from posttrain.run.callbacks import FiniteWeights
from posttrain.run.directory import RunError
from posttrain.run.evaluating import _refuse_failing, check_context
from posttrain.run.progress import ConsoleProgress
from posttrain.run.trainers import run_training


def state(step=3):
    state = TrainerState(global_step=step, max_steps=10)
    state.is_world_process_zero = True
    return state


def test_a_pipe_gets_one_plain_line_per_log():
    out = io.StringIO()
    progress = ConsoleProgress("rlvr", Console(file=out, width=40))
    progress.on_train_begin(None, state(), TrainerControl())
    logs = {"loss": 0.123456, "reward": math.nan, "entropy": 2.0, "completions/mean_length": 7.25, "epoch": 1}
    progress.on_log(None, state(), TrainerControl(), logs=logs)
    progress.on_log(None, state(), TrainerControl(), logs={"train_runtime": 1.0, "loss": 9.0})
    progress.on_train_end(None, state(), TrainerControl())
    # nothing wrapped, nothing that is not a number, nothing of the summary
    assert out.getvalue() == "rlvr 3/10  loss 0.1235  entropy 2  length 7.25\n"


def test_other_ranks_are_silent():
    out = io.StringIO()
    progress = ConsoleProgress("rlvr", Console(file=out))
    other = state()
    other.is_world_process_zero = False
    progress.on_log(None, other, TrainerControl(), logs={"loss": 1.0})
    assert out.getvalue() == ""


def test_the_terminal_is_given_back_when_training_fails():
    out = io.StringIO()
    progress = ConsoleProgress("rlvr", Console(file=out, force_terminal=True))

    def train(resume_from_checkpoint):
        assert resume_from_checkpoint is None
        progress.on_train_begin(None, state(0), TrainerControl())
        raise RuntimeError("out of memory")

    trainer = SimpleNamespace(train=train, callback_handler=SimpleNamespace(callbacks=[progress]))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_training(trainer, None)
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().count(hidden) == out.getvalue().count(shown) == 1


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
def test_broken_weights_are_not_saved(event):
    model = torch.nn.Linear(2, 2)
    saving, going_on = TrainerControl(should_save=True), TrainerControl(should_save=False)
    call = getattr(FiniteWeights(), event)
    call(None, state(), saving, model=model)
    model.bias.data[1] = math.inf
    call(None, state(), going_on, model=model)  # looked at only when something is written
    with pytest.raises(FloatingPointError, match=r"not finite after 3 optimiser steps \(first: bias\)"):
        call(None, state(), saving, model=model)
    model.bias.requires_grad_(False)  # a frozen base is what it was
    call(None, state(), saving, model=model)


def evaluation(failed, total=10):
    statuses = ["timeout"] * failed + ["wrong"] * (total - failed)
    samples = [Sample("text", status, 0.0, None, 2, True, "took too long") for status in statuses]
    settings = EvaluateConfig(k=[1], samples=total, resamples=100).model_dump()
    return summarise([Problem(0, "p", None, samples)], distinct={}, settings=settings, seconds=1.0, tokens=20)


def test_an_evaluation_needs_a_verifier_that_works():
    reward = SimpleNamespace(__name__="mine", config=RewardConfig(name="verifier", max_failures=0.2))
    _refuse_failing(evaluation(2), reward)
    with pytest.raises(
        VerifierFailure, match=r"3 of 10 .* error \(0\) or timeout \(3\); at most 20% may"
    ) as caught:
        _refuse_failing(evaluation(3), reward)
    assert "took too long" in str(caught.value)


def test_prompts_and_completions_fit_the_context_or_are_refused():
    text = SimpleNamespace(max_position_embeddings=64)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    config = RunConfig(
        task="rlvr",
        data={"source": "reasoning_gym:chain_sum"},
        rewards=["verifier"],
        trainer={"max_completion_length": 24},
    )
    check_context(config, model, 40)
    with pytest.raises(RunError, match="to at most 23"):
        check_context(config, model, 41)
    del text.max_position_embeddings  # state-space models have none
    check_context(config, model, 10_000)
