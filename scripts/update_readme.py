"""Rewrite the generated parts of README.md: the table of methods. A test compares the file with this."""

from __future__ import annotations

from pathlib import Path

from posttrain.config import launch_matrix, method_pages

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- methods: written by scripts/update_readme.py -->", "<!-- end of methods -->"


def methods_table() -> str:
    """Return the table of all built-in methods as Markdown."""
    rows = ["| config key | task | method | paper | launches |", "|---|---|---|---|---|"]
    for cls in method_pages.available().values():
        papers = cls.paper if isinstance(cls.paper, tuple) else (cls.paper,)
        links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers if paper) or "-"
        task = method_pages.task_of(cls)
        launches = launch_matrix.summary(task, cls.name)
        rows.append(f"| `{cls.name}` | {task} | {cls.title} | {links} | {launches} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    """Return the README with its generated parts rewritten."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{methods_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
