"""Write posttrain/config/launch_matrix.json: every method, selector and backend under every launch.

    python scripts/update_launch_matrix.py [MODE...]

Needs DeepSpeed. With modes, the other columns stay as they are. Ends with 1 when a cell is broken: the file
is then not written. Some minutes per mode on one core.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "matrix"))

import cases
import measure

from posttrain.config.launch_matrix import FILE, matrix

PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft")


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def main(modes: list[str]) -> int:
    """Measure, and write the file unless something is broken."""
    before = matrix() if FILE.is_file() else {"cells": {}}
    if set(modes) != set(measure.MODES) and before.get("versions") != versions():
        print("the file was measured with other versions: measure all modes", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("POSTTRAIN_MATRIX_RUNS", temporary))
        single = measure.run(folder / "single", "single")
        found = {mode: measure.run(folder / mode, mode) for mode in modes}
    table, broken = measure.table(single, found), []
    cells: dict[str, Any] = {}
    for name in cases.CASES:
        row = table[name]
        if "single" not in row:
            row = {
                mode: cell for mode, cell in before["cells"].get(name, {}).items() if mode != "single"
            } | row
            row = {mode: row[mode] for mode in measure.MODES if mode in row}
        cells[name] = row
        broken += [f"{name}, {mode}: {c['reason']}" for mode, c in row.items() if c["verdict"] == "broken"]
    for line in broken:
        print(line, file=sys.stderr)
    if broken:
        return 1
    text = {
        "about": "written by scripts/update_launch_matrix.py",
        "processes": 2,
        "steps": cases.STEPS,
        "bars": {"losses": measure.LOSSES, "weights": measure.WEIGHTS},
        "versions": versions(),
        "cells": cells,
    }
    FILE.write_text(json.dumps(text, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(measure.MODES)))
