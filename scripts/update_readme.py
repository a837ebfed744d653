"""Rewrite the generated parts of README.md: the table of methods. A test compares the file with this."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain.config import launch_matrix, method_pages

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- methods: written by scripts/update_readme.py -->", "<!-- end of methods -->"


EFFECT = re.compile(r"^\| `(\w+)` \| [^|]+ \| \*\*(.+?)\*\*", re.MULTILINE)


def effects(text: str) -> dict[str, str]:
    """Return what the table of claims, written by hand from the runs, says of each method."""
    return dict(EFFECT.findall(text))


def methods_table(measured: dict[str, str]) -> str:
    """Return the table of all built-in methods as Markdown."""
    rows = [
        "| config key | task | method: its idea | paper | launches | effect here |",
        "|---|---|---|---|---|---|",
    ]
    for cls in method_pages.available().values():
        papers = cls.paper if isinstance(cls.paper, tuple) else (cls.paper,)
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers if paper) or "-"
        task = method_pages.task_of(cls)
        launches = launch_matrix.summary(task, cls.name)
        effect = measured.get(cls.name, "-")
        rows.append(f"| `{cls.name}` | {task} | {cls.title} | {links} | {launches} | {effect} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """Return the README with its generated parts rewritten."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{methods_table(effects(after))}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
