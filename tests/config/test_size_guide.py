"""configs/README.md holds what the memory forecast says."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script():
    path = ROOT / "scripts" / "update_size_guide.py"
    spec = importlib.util.spec_from_file_location("update_size_guide", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_size_guide_is_current():
    """The text, every combination, and the forecast of one row; the others take minutes."""
    made, text = script(), (ROOT / "configs" / "README.md").read_text()
    assert text.startswith(made.head()), "run python scripts/update_size_guide.py"
    rows = text.removeprefix(made.head()).splitlines()
    assert [row.split(" | ")[:3] for row in rows] == [
        [f"| {size}", name, str(gpus)]
        for size in made.SHAPES
        for name in made.TASK_NAMES.values()
        for gpus in made.GPUS
    ]
    sizes = made.Sizes("0.5B")  # traces once
    for gpus in made.GPUS:
        way = sizes.way("sft", gpus, adapter=True)
        assert rows[made.GPUS.index(gpus)].endswith(f"| {way.text(False)} |"), "run the script"


def test_launch_files_are_there():
    made = script()
    files = {"single", *(file for file, *_ in (*made.WHOLE, *made.ADAPTER))}
    for file in files:
        assert (ROOT / "configs" / "accelerate" / f"{file}.yaml").is_file()


def test_what_does_not_fit_is_not_named():
    """All weights of 7B need more than a card of 80 GB, whatever the batch; that is known without a trace."""
    assert script().Sizes("7B").way("sft", 1, adapter=False) is None
