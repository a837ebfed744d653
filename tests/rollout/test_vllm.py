"""Real vLLM on the CPU: the engine follows the trainer, for every way of training, and is sent no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VENV = Path(os.environ.get("POSTTRAIN_VLLM_VENV", f"{sys.prefix}-vllm"))
PYTHON = VENV / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"vLLM is not installed in {VENV}: bash scripts/setup_vllm_cpu.sh"
    ),
]
STEPS = 9


def run_with_vllm(script: str, *arguments: str, timeout: int = 600) -> None:
    """Run a script of this folder with the environment that has vLLM."""
    done = subprocess.run(
        [PYTHON, str(Path(__file__).parent / script), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each run found; one process, a few seconds an engine."""
    folder = tmp_path_factory.mktemp("vllm")
    run_with_vllm("vllm_checks.py", str(folder))
    return json.loads((folder / "found.json").read_text())


def test_upstreams_sync_does_not_work_on_this_backend(found) -> None:
    assert "weight_loader" in (found["upstream_fails"]["error"] or "nothing: is ours still needed?")


@pytest.mark.parametrize(
    ("run", "limit"),
    # fp32: rounding; bf16: the type of the forward itself
    [("untied", 1e-5), ("tied", 1e-5), ("dora_qwen", 1e-5), ("packed", 1e-5), ("halves", 1e-5),
     ("growing", 1e-5), ("methods", 1e-5), ("lora_bf16", 0.01)],
)  # fmt: skip
def test_sampler_and_trainer_agree_at_every_step(found, run: str, limit: float) -> None:
    gaps = found[run]["gap"]
    assert found[run]["syncs"] >= len(gaps) >= 5
    assert max(gaps) < limit
    # no growth: the last third against the first
    third = len(gaps) // 3
    assert sum(gaps[-third:]) < 3 * sum(gaps[:third])


@pytest.mark.parametrize("run", ["untied", "tied"])
def test_the_weights_really_moved(found, run: str) -> None:
    assert found[run]["moved"] > 0.01
    assert found[run]["share"] == [1.0] * STEPS


def test_lora_sends_the_adapted_tensors_and_leaves_a_bf16_base_alone(found) -> None:
    run = found["lora_bf16"]
    assert run["base_changed"] == []
    assert run["bytes"] == [run["model_bytes"]] + [run["adapted_bytes"]] * (STEPS - 1)


def test_packed_values_are_what_is_sent(found) -> None:
    run = found["packed"]
    first, positions, *later = run["bytes"]
    assert first == run["model_bytes"]
    assert positions == 2 * later[0]  # int32 positions beside fp32 values, once
    assert all(sent <= 1.1 * run["changed_bytes"] for sent in later)
    assert run["share"][-1] == pytest.approx(0.05, rel=0.01)


def test_frozen_halves_stay_where_they_are(found) -> None:
    run = found["halves"]
    assert run["bytes"] == [run["model_bytes"]] + [run["touched_bytes"]] * (STEPS - 1)
    assert run["touched_bytes"] < 0.7 * run["model_bytes"]


def test_what_a_growing_selection_has_not_released_is_not_sent(found) -> None:
    sent = found["growing"]["bytes"][1:]
    assert sent[0] < 0.3 * max(sent)
    assert max(sent) < 0.2 * found["growing"]["model_bytes"]  # a tenth of the scalars, and where they are


def test_refills_extra_rows_and_evaluation_go_through_the_engine(found) -> None:
    run = found["methods"]
    assert run["temperatures"] == [0.8, 1.0, 1.2]
    assert run["generations"] > 2 * len(run["gap"])
    assert run["eval_rewards"]


def test_a_resumed_run_sends_everything_once_and_goes_on_bit_for_bit(found) -> None:
    run = found["resumed"]
    assert run["different"] == []
    straight, again = run["shares"]  # generations at steps 0, 2 and 4; the checkpoint is from step 3
    assert straight[0] == again[-1] == 1.0
    assert max(straight[1:]) < 0.7
    assert again[:-1] == straight[:-1]


def test_an_adapter_on_tied_embeddings_is_refused_before_an_engine_starts(found) -> None:
    assert "ties them" in found["refused"]["error"]
    assert found["refused"]["seconds"] < 60
