"""Which methods and selections run under which launch, as measured.

``launch_matrix.json`` is written by ``scripts/update_launch_matrix.py`` and by nothing else. That trains a
small model with every method, selector and backend on two processes of each kind of launch, and compares
losses and weights with those of one process. What is refused, is refused by the configuration check.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from posttrain.config.launch import TITLES, Mode

FILE = Path(__file__).with_suffix(".json")
MODES: tuple[Mode, ...] = ("ddp", "zero2", "zero3", "fsdp2")

Cell = dict[str, Any]
"""``verdict`` (``works`` or ``refused``); ``losses`` and ``weights``, largest differences; or ``reason``."""


@functools.cache
def matrix() -> dict[str, Any]:
    """Return the whole file: versions, bars, and ``cells`` by case and mode."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def cells_of(task: str, name: str) -> dict[str, dict[str, Cell]]:
    """Return the cells of a method or selector, by how it was used, then by mode.

    Args:
        task: ``selection`` for selectors, whose uses are the backends; those of methods are ``full`` (all
            weights) and ``lora``. A use that one process refuses is left out.
        name: Of the method or selector; one of the user's own has no cells.
    """
    head = f"{task}/{name}"
    uses = (
        {key.removeprefix(f"{head}:"): key for key in matrix()["cells"] if key.startswith(f"{head}:")}
        if task == "selection"
        else {"full": head, "lora": f"{head}+lora"}
    )
    found = {use: matrix()["cells"].get(key) for use, key in uses.items()}
    return {use: cells for use, cells in found.items() if cells is not None and cells.keys() != {"single"}}


def runs_under(task: str, name: str) -> list[Mode]:
    """Return the modes in which a method or selector works in some use."""
    cells = cells_of(task, name).values()
    return [mode for mode in MODES if any(use[mode]["verdict"] == "works" for use in cells)]


def summary(task: str, name: str) -> str:
    """Return the modes in which it works, in a few words."""
    modes = runs_under(task, name)
    if len(modes) == len(MODES):
        return "all"
    return ", ".join(TITLES[mode].removeprefix("DeepSpeed ") for mode in modes) or "-"
