"""Data files that may not be any, drawn from a seeded generator."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

from fuzz_configs import HOSTILE

GOOD_ROWS: tuple[dict[str, Any], ...] = tuple(
    {
        "prompt": f"{i} + {i + 1} =",
        "answer": str(2 * i + 1),
        "completion": f" {2 * i + 1}",
        "chosen": f" {2 * i + 1}",
        "rejected": f" {i}",
    }
    for i in range(6)
)
NASTY_CELLS: list[Any] = [*HOSTILE["cells"], "a" * 100_000]
CHAT: tuple[dict[str, Any], ...] = tuple(
    {
        "prompt": [{"role": "user", "content": f"{i} + 1 ="}],
        "completion": [{"role": "assistant", "content": str(i + 1)}],
        "chosen": [{"role": "assistant", "content": str(i + 1)}],
        "rejected": [{"role": "assistant", "content": "?"}],
        "messages": [{"role": "user", "content": f"{i} + 1 ="}, {"role": "assistant", "content": str(i + 1)}],
        "answer": str(i + 1),
    }
    for i in range(6)
)


def hostile_rows(rng: random.Random) -> list[Any]:
    """Return rows with a few things wrong: cells, columns, or whole rows."""
    rows: list[Any] = json.loads(json.dumps(rng.choice([GOOD_ROWS, GOOD_ROWS, CHAT])))
    kind = rng.randrange(8)
    names = list(rows[0])
    if kind == 0:
        name, new = (
            rng.choice(names),
            rng.choice(
                [
                    "question",
                    "promt",
                    "Prompt",
                    "instruction",
                    "prompts",
                    "completion_ids",
                    "posttrain_place",
                    "",
                    " prompt",
                    "images",
                    "step",
                ]
            ),
        )
        rows = [{new if key == name else key: value for key, value in row.items()} for row in rows]
    elif kind == 1:
        rows[rng.randrange(len(rows))] = rng.choice(NASTY_CELLS)
    elif kind == 2:
        cell, name = rng.choice(NASTY_CELLS), rng.choice([*names, "images", "tools", "extra"])
        for row in rows:
            row[name] = cell
    elif kind == 3:
        del rows[rng.randrange(len(rows))][rng.choice(names)]
    elif kind == 4:
        rows = rows[: rng.randrange(3)]
    elif kind == 5:
        for row in rows:
            row["prompt"] = rows[0]["prompt"]
    for _ in range(rng.randrange(3)):
        if rows and isinstance(row := rng.choice(rows), dict):
            row[rng.choice([*names, "extra"])] = rng.choice(NASTY_CELLS)
    return rows


def hostile_data_file(rng: random.Random, folder: Path) -> Path:
    """Write a data file that may not be one, and return its path."""
    rows = hostile_rows(rng)
    suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".parquet"])
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        data = _parquet(rng, rows)
    elif suffix == ".csv":
        cells = [
            list(rows[0]) if rows and isinstance(rows[0], dict) else ["a"],
            *([str(v) for v in row.values()] if isinstance(row, dict) else [str(row)] for row in rows),
        ]
        rng.random() < 0.2 and cells[0].append(rng.choice(cells[0] or ["x"]))
        quoted = rng.choice(['"{}"', "{}", '"{}'])
        data = "\n".join(
            ",".join(quoted.format(cell.replace('"', '""')) for cell in line) for line in cells
        ).encode("utf-8", "surrogatepass")
    elif suffix == ".json":
        data = json.dumps(rng.choice([rows, rows, {"data": rows}, rows[0] if rows else None, 3])).encode()
    else:
        data = "\n".join(json.dumps(row) for row in rows).encode()
    kind = rng.randrange(16)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        data = data[:at]
    elif kind == 1:
        data = (
            data[:at]
            + rng.choice(
                [
                    b"\xff",
                    b"\0",
                    b"\xed\xa0\x80",
                    b"\r",
                    b"\n\n",
                    b"\xe2\x80\xa8",
                    b"NaN",
                    b"\\ud800",
                    b"1e999",
                    b'"',
                ]
            )
            + data[at:]
        )
    elif kind == 2:
        data = data.replace(b"\n", b"\r\n")
    elif kind == 3:
        data = b"\xef\xbb\xbf" + data
    elif kind == 4 and suffix != ".parquet":
        data = data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "latin-1"]), "replace")
    elif kind == 5:
        data = rng.choice(
            [
                b"",
                b"\n\n",
                b" ",
                b"\xef\xbb\xbf",
                b"\xef\xbb\xbf\n",
                b"\0",
                b"PAR1",
                b"\n\na,b\n1,2\n",
                b"null",
                b"[]",
                b"[[]]",
                b"{}",
                b"{}\n{}",
                b",\n,",
                b'"',
                b"\x1f\x8b\x08\0",
            ]
        )
    elif kind == 6 and suffix == ".jsonl":
        data += b"\n" + rng.choice(
            [
                b'{"prompt": ' + b"9" * 5000 + b"}",
                b"[" * 3000 + b"]" * 3000,
                b'{"a": ' * 3000 + b"1" + b"}" * 3000,
                b'{"prompt": NaN}',
                b'{"prompt": "\\ud800"}',
                b'{"prompt": "a", "prompt": 3}',
                b'{"prompt": 1e999}',
                b"{'prompt': 'a'}",
                b'{"x": ' + b"[" * 300 + b"]" * 300 + b"}",
            ]
        )
    elif kind == 7:
        import gzip

        data = gzip.compress(data)
        path = folder / f"rows{suffix}{rng.choice(['.gz', ''])}"
    elif kind == 8:
        path.mkdir()
        return path
    path.write_bytes(data)
    return path


def _parquet(rng: random.Random, rows: list[Any]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            arrays.append(pa.array(values))
        except (pa.ArrowException, ValueError, OverflowError):
            arrays.append(pa.array([str(value).encode("utf-8", "surrogatepass") for value in values]))
    if names and rng.random() < 0.15:
        names.append(rng.choice(names))
        arrays.append(arrays[0])
    if names and rng.random() < 0.3:
        odd: Any = rng.choice(
            [
                pa.large_string(),
                pa.binary(),
                pa.decimal128(10, 2),
                pa.timestamp("us"),
                pa.dictionary(pa.int32(), pa.string()),
                pa.null(),
                pa.float16(),
                pa.duration("s"),
                pa.map_(pa.string(), pa.int32()),
            ]
        )
        at = rng.randrange(len(names))
        with contextlib.suppress(pa.ArrowException, NotImplementedError):
            arrays[at] = arrays[at].cast(odd) if rng.random() < 0.5 else pa.nulls(len(rows), odd)
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(arrays, names=names), sink)
    except pa.ArrowException:  # a type that Parquet has not
        pq.write_table(pa.table([pa.array(["a"] * len(rows)) for _ in names], names=names), sink)
    return sink.getvalue()
