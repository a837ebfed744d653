"""Two processes through torchrun: one writes, both agree, and a refusal reaches both."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_jobs import STEPS, assert_same, json_lines, outcome, posttrain, write_config

pytestmark = pytest.mark.slow

SMALL = {"warm_start": {"trainer": {"max_steps": 8, "per_device_train_batch_size": 8}}}
# half of what one process has
PER_RANK = {"trainer": {"per_device_train_batch_size": 8, "save_total_limit": 3}}


def launch(folder: Path, *arguments, ranks=2, apart=False):
    """Run a verb on ``ranks`` processes; return (exit codes by rank, stdout, stderr).

    torchrun's own exit code says only that some process failed, so each rank writes down its own. Ranks
    that are apart have a working directory each, as nodes without a common file system.
    """
    folder.mkdir(exist_ok=True)
    entry = folder / "entry.py"
    entry.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from posttrain.cli import app\n"
        f"here = Path({str(folder)!r}, os.environ['RANK'] if {apart} else '')\n"
        "here.mkdir(exist_ok=True)\n"
        "os.chdir(here)\n"
        f"code = Path({str(folder)!r}) / f\"code-{{os.environ['RANK']}}\"\n"
        "try:\n"
        "    app(sys.argv[1:], prog_name='posttrain')\n"
        "except SystemExit as end:\n"
        "    code.write_text(str(end.code))\n"
        "    raise\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    done = subprocess.run(
        [*command, str(entry), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": ""},
    )
    codes = [(folder / f"code-{rank}") for rank in range(ranks)]
    return [int(path.read_text()) if path.exists() else None for path in codes], done.stdout, done.stderr


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    config = write_config(folder, folder / "run", SMALL, PER_RANK)
    codes, out, err = launch(folder, "train", config, "--json")
    assert codes == [0, 0], err[-4000:]
    return folder, out, err


def test_ranks_that_do_not_see_the_run_directory_are_refused(tmp_path):
    config = write_config(tmp_path, "run", SMALL, PER_RANK)
    codes, _, err = launch(tmp_path / "nodes", "train", config, apart=True)
    assert codes == [2, 2], err[-4000:]
    assert "run is not the same folder on all machines: rank 1 on" in err
    assert err.count("Choose a run_dir on a file system that every node mounts") == 1
    assert not list((tmp_path / "nodes").glob("*/run/*"))


def test_one_process_writes(two_ranks):
    folder, out, err = two_ranks
    run = folder / "run"
    rows = json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    completions = json_lines(run / "completions.jsonl")
    assert [row["step"] for row in completions] == [step for step in (1, 3, 5, 7) for _ in range(8)]
    assert json.loads(out)["steps"] == STEPS  # one answer on stdout, not two
    assert err.count("training: 40 rows") == 1
    assert err.count("exported (full)") == 1
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["launch"]["processes"] == 2
    assert not list(run.rglob("*.partial"))
    # exact resume needs the state of each rank
    names = {path.name for path in (run / "checkpoints" / f"checkpoint-{STEPS}").iterdir()}
    assert {"posttrain_state_0.pt", "posttrain_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= names


def test_the_evaluation_is_that_of_one_process(two_ranks):
    run = two_ranks[0] / "run"
    expected = json.loads((run / "evaluation.json").read_text())["after"]
    found = json.loads(posttrain("eval", run, "--json").stdout)
    assert found["metrics"] == expected["metrics"]
    assert found["verdicts"] == expected["verdicts"]


def test_eval_on_two_processes(two_ranks):
    folder, _, _ = two_ranks
    out_file = folder / "evaluation.json"
    codes, out, err = launch(folder, "eval", folder / "run", "--json", "--out", out_file)
    assert codes == [0, 0], err[-4000:]
    expected = json.loads((folder / "run" / "evaluation.json").read_text())["after"]
    assert json.loads(out)["metrics"] == expected["metrics"]
    assert json.loads(out_file.read_text())["problems"] == expected["problems"]


def test_a_resumed_run_on_two_processes_goes_on_exactly(two_ranks, tmp_path):
    whole, run = two_ranks[0] / "run", tmp_path / "run"
    shutil.copytree(whole, run)
    # as if killed after the third step, in the middle of a generation
    for folder in ("checkpoints/checkpoint-6", f"checkpoints/checkpoint-{STEPS}", "export"):
        shutil.rmtree(run / folder)
    config = write_config(tmp_path, run, SMALL, PER_RANK)
    codes, _, err = launch(tmp_path, "train", config, "--resume")
    assert codes == [0, 0], err[-4000:]
    assert err.count("going on from checkpoint-3") == 1
    assert_same(outcome(run), outcome(whole))


def test_a_refusal_ends_both_processes_with_2(two_ranks, tmp_path):
    folder, _, _ = two_ranks
    config = folder / "config.yaml"
    codes, out, err = launch(tmp_path, "train", config)
    assert codes == [2, 2], err[-4000:]
    assert err.count("already holds a run") == 1
    assert out == ""


def test_a_wrong_configuration_is_told_once(two_ranks, tmp_path):
    codes, _, err = launch(tmp_path, "train", two_ranks[0] / "config.yaml", "trainer.temperature=-1")
    assert codes == [2, 2]
    assert err.count("temperature has a value that is not allowed") == 1


def test_a_failure_of_the_writing_process_ends_both(two_ranks, tmp_path):
    (tmp_path / "file").write_text("x")
    below = f"export.dir={tmp_path / 'file' / 'mine'}"
    codes, _, err = launch(tmp_path, "train", two_ranks[0] / "config.yaml", "--resume", below)
    assert codes == [1, 1], err[-4000:]
    assert "failed (rank 0): " in err
    assert "failed (rank 1): RuntimeError: the main process failed: " in err
    assert (tmp_path / "file").read_text() == "x"


def test_a_target_in_use_by_something_else_is_told_once(two_ranks, tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("x")
    codes, _, err = launch(
        tmp_path, "train", two_ranks[0] / "config.yaml", "--resume", f"export.dir={target}"
    )
    assert codes == [2, 2], err[-4000:]
    assert err.count("holds files that are not an export of ours") == 1
    assert (target / "thesis.tex").exists()
