"""Runs whose files hold anything at all: report, doctor and samples answer, whatever it is."""

import io
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_doctor_run import BROKEN, make

from posttrain.doctor.finding import print_findings
from posttrain.doctor.run import examine
from posttrain.report import write_report
from posttrain.report.samples import at_step, held_out, newest, print_samples
from posttrain.run.directory import RunDirectory

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from report_runs import make_run

VALUES = [
    None, True, 0, -1, 1e308, 10**400, float("nan"), "", "\ud800", "\x1b[2J", [], {}, [1, {"a": None}], "[]",
    {"value": None}, {"metrics": [1]}, 1e-300,
]  # fmt: skip


def mutate(value, rng, rate):
    if rng.random() < rate:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        kept = {key: mutate(item, rng, rate) for key, item in value.items() if rng.random() > rate / 3}
        return kept | ({rng.choice(["step", "x", "<b>"]): rng.choice(VALUES)} if rng.random() < rate else {})
    if isinstance(value, list):
        return [mutate(item, rng, rate) for item in value if rng.random() > rate / 3]
    return value


def ask_everything(root):
    run, console = RunDirectory(root), Console(file=io.StringIO())
    write_report([root], root / "page.html")
    state, findings = examine(root)
    json.dumps([state.to_dict(), *(row.to_dict() for row in findings)])
    print_findings(findings, console, "")
    print_samples([*newest(run), *at_step(run, 3), *held_out(run)], console)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_runs(name, tmp_path):
    files = {key: value for key, value in BROKEN[name].items() if "\udcff" not in str(value)}
    root = make(tmp_path / "run", **files).root
    if files != BROKEN[name]:
        for path in root.iterdir():
            path.write_bytes(b"\xff\xfe" + path.read_bytes())
    if name == "only a config":
        (root / "metrics.jsonl").mkdir()
    ask_everything(root)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_runs(seed, tmp_path):
    rng, root = random.Random(seed), make_run(tmp_path / "run")
    rate = rng.choice([0.002, 0.02, 0.1, 0.4])
    (root / "status.json").write_text(json.dumps({"state": "failed", "started": "2026", "host": "a"}))
    row = {"time": "2026", "rank": 0, "type": "E", "error": "x", "traceback": ["a"]}
    (root / "failures.jsonl").write_text((json.dumps(row) + "\n") * 3)
    for path in [path for path in root.iterdir() if path.is_file()]:
        if path.suffix == ".yaml":
            texts = [json.dumps(mutate(yaml.safe_load(path.read_text()), rng, rate))]
        else:
            parts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            texts = [json.dumps(mutate(json.loads(part), rng, rate)) for part in parts]
        data = "\n".join(texts).encode() + b"\n"
        if rng.random() < 0.3:  # cut anywhere, with rubbish at the end
            data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.choice([0, 3, 50]))
        path.write_bytes(data)
    ask_everything(root)
    shutil.rmtree(root / "warm_start")
    ask_everything(root)
