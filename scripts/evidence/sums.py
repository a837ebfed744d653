"""Write sums with worked solutions, as JSON lines: ``python scripts/evidence/sums.py OUT.jsonl``.

A row has ``prompt`` ("7-1-9-7:"), ``answer`` (the solution to learn in a warm start, one step per line:
"7-1=6", "6-9=-3", "-3-7=-10") and ``final`` (the last number, for a verifier). Questions are distinct; the
same arguments give the same file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def problem(numbers: random.Random, terms: int) -> dict[str, str]:
    """Return one row: a sum of ``terms`` one-digit numbers, its running totals, and the last of them."""
    total = numbers.randint(1, 9)
    prompt, steps = str(total), []
    for _ in range(terms - 1):
        sign, term = numbers.choice("+-"), numbers.randint(1, 9)
        after = total + term if sign == "+" else total - term
        steps.append(f"{total}{sign}{term}={after}")
        prompt, total = f"{prompt}{sign}{term}", after
    return {"prompt": f"{prompt}:", "answer": "\n".join(steps), "final": str(total)}


def main(arguments: list[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=22_000)
    parser.add_argument("--terms", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    possible = 9 * 18 ** (given.terms - 1)
    if given.rows > possible // 2:
        raise SystemExit(
            f"--rows {given.rows} is more than half of the {possible} sums of {given.terms} terms: ask for "
            f"fewer rows or more terms"
        )
    numbers, rows = random.Random(given.seed), {}
    while len(rows) < given.rows:
        row = problem(numbers, given.terms)
        rows[row["prompt"]] = row
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows.values())


if __name__ == "__main__":
    main()
