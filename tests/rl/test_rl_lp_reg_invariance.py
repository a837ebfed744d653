"""With ``scope="generation_batch"`` a run does not depend on micro-steps, ranks, or where it was resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
from transformers import TrainerCallback

from posttrain import GRPOTrainer
from posttrain.checkpointing.folders import newest_checkpoint
from posttrain.rl import LpReg

TESTS = Path(__file__).resolve().parents[1]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(tmp_path, name, *, per_device, accumulation=1, ranks=1, iterations=1):
    out = tmp_path / name / "result.json"
    out.parent.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [str(out), str(per_device), str(accumulation), str(iterations)]
    path = os.pathsep.join([str(TESTS), str(TESTS / "rl"), str(TESTS.parent)])
    done = subprocess.run(
        [*launcher, str(TESTS / "rl" / "lp_reg_ranks.py"), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def same(left, right, *, gauges):
    for a, b in zip(left["logs"], right["logs"], strict=True):
        # the log averages gauges over micro-steps, whatever their numbers of tokens
        columns = len(a) if gauges else 2
        assert a[:columns] == pytest.approx(b[:columns], rel=2e-4, abs=2e-6)
        assert 0 < a[2] < 1
        assert a[3] > 0
    assert left["weights"] == pytest.approx(right["weights"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2], ids=["on-policy", "off-policy"])
def test_four_times_eight_and_two_ranks_are_thirty_two(iterations, tmp_path):
    once = run(tmp_path, "once", per_device=32, iterations=iterations)
    split = run(tmp_path, "split", per_device=8, accumulation=4, iterations=iterations)
    same(split, once, gauges=False)
    ranks = run(tmp_path, "ranks", per_device=16, ranks=2, iterations=iterations)
    same(ranks, once, gauges=True)


@pytest.mark.parametrize("scope", ["micro_batch", "generation_batch"])
@pytest.mark.parametrize("stop", [2, 3], ids=["boundary", "inside"])
def test_resume_is_exact(scope, stop, tmp_path):
    def train(folder, stop=None, resume=None):
        trainer = GRPOTrainer(
            model=support.model(initializer_range=0.3),
            args=support.grpo_config(folder, max_steps=6, num_iterations=2, epsilon=1.0, epsilon_high=9.0),
            reward_funcs=support.letter_reward,
            train_dataset=support.prompts(12),
            processing_class=support.tokenizer(),
            methods=[LpReg(rho=0.9, kappa=0.01, scope=scope)],
            callbacks=[StopAt(stop)] if stop else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train(tmp_path / "straight")
    train(tmp_path / "parts", stop=stop)
    resumed = train(tmp_path / "parts", resume=str(newest_checkpoint(tmp_path / "parts")))
    support.assert_same(support.weights(straight.model), support.weights(resumed.model))
    keys = ("loss", "grad_norm", "lp_reg/gated_tokens", "lp_reg/log_ratio_mean")
    assert support.logged(straight, *keys) == support.logged(resumed, *keys)
    assert any(row[2] > 0 for row in support.logged(straight, *keys))
