"""Local files, read strictly: every complaint names the file and the line."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from posttrain.data.errors import DataError, listed

PLACE = "posttrain_place"
"""Column with the place of each row, where one was asked for: ``rows.jsonl:7``."""


@dataclass(frozen=True)
class Table:
    """Rows and where they stand, for messages.

    Attributes:
        dataset: The rows.
        place: The file, folder, Hub id or generated task.
        lines: The line of each row in a text file (from 1), or None: rows are then counted from 1.
        notes: What was done on the way, for the log and the manifest.
    """

    dataset: Dataset
    place: str
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()

    def where(self, index: int) -> str:
        """Return ``line 7`` or ``row 7`` for the row at ``index`` (from 0)."""
        return f"line {self.lines[index]}" if self.lines is not None else f"row {index + 1}"


def with_places(table: Table) -> Table:
    """Return the table with the column :data:`PLACE`; rows keep it through renaming, sampling and splits.

    Raises:
        DataError: The data have a column of that name.
    """
    if PLACE in table.dataset.column_names:
        raise DataError(
            f"{table.place}: the column {PLACE!r} is written here: rename or drop the one in the data"
        )
    where = (
        [f"{table.place}:{line}" for line in table.lines]
        if table.lines is not None
        else [f"{table.place}, row {number}" for number in range(1, len(table.dataset) + 1)]
    )
    return Table(table.dataset.add_column(PLACE, where), table.place, table.lines, table.notes)


def read_file(path: Path) -> Table:
    """Read a .jsonl, .json, .csv or .parquet file.

    Args:
        path: The file; UTF-8 (a byte order mark is allowed) unless parquet. A .json file holds one list of
            objects. All values of a .csv file are text; its first line names the columns.

    Raises:
        DataError: Missing, empty, not UTF-8, truncated or malformed lines, values of mixed types in a column.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; one of {', '.join(READERS)} is needed")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS)[:10]
        beside = (
            f" The folder {path.parent} has: {', '.join(near)}"
            if near
            else f" Working directory: {Path.cwd()}"
        )
        raise DataError(f"{path}: no such file.{beside}")
    table = reader(path)
    if not len(table.dataset):
        raise DataError(f"{path}: the file has no rows")
    return table


def to_table(rows: Sequence[dict[str, Any]], lines: Sequence[int] | None, place: str) -> Table:
    """Turn rows into a table; columns that a row lacks are None there.

    Raises:
        DataError: A column mixes types, or holds what Arrow cannot (lone surrogates, integers over 64 bits).
    """
    columns = {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
    }
    # the rows are not in a Dataset yet, but messages about them need only their places
    where = Table(Dataset.from_dict({}), place, lines).where
    problems = [text for name, values in columns.items() for text in _mixed(name, values, where)]
    if problems:
        raise DataError(
            f"{place}: {len(problems)} values do not fit their column; write one type per "
            f"column\n{listed(problems)}"
        )
    try:
        dataset = Dataset.from_dict(columns)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:  # Arrow's own errors are ValueErrors and TypeErrors
        reason = "a value is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{place}: the rows cannot be made into a table: {reason}") from error
    return Table(dataset, place, lines)


def _mixed(name: str, values: Sequence[Any], where: Callable[[int], str]) -> list[str]:
    first: tuple[str, int] | None = None
    problems = []
    for index, value in enumerate(values):
        kind = _kind(value)
        if kind is None:
            continue
        if kind == "text" and not _encodable(value):
            problems.append(
                f"{where(index)}: column {name!r} has a lone surrogate (half a \\u pair), which is not text"
            )
        if first is None:
            first = kind, index
        elif kind != first[0]:
            problems.append(
                f"{where(index)}: column {name!r} holds {kind}, but {first[0]} in {where(first[1])}"
            )
    return problems


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    names = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "perhaps Latin-1"
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 ({hint}). "
            "Save the file as UTF-8, for example with: iconv -f LATIN1 -t UTF-8"
        ) from None


def _read_jsonl(path: Path) -> Table:
    rows, lines, problems = [], [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {_json_problem(error)}: {_excerpt(line)}")
            continue
        if isinstance(row, dict):
            rows.append(row)
            lines.append(number)
        else:
            problems.append(
                f"line {number}: {_kind(row) or 'null'} where an object is needed: {_excerpt(line)}"
            )
    if problems:
        hint = "; a file with one list of objects is .json" if problems[0].startswith("line 1:") else ""
        raise DataError(f"{path}: {len(problems)} lines are not JSON objects{hint}\n{listed(problems)}")
    return to_table(rows, lines, str(path))


def _read_json(path: Path) -> Table:
    text = _text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        hint = " (one object per line is .jsonl)" if text.lstrip().startswith("{") else ""
        raise DataError(f"{path}{where}: not JSON{hint}: {_json_problem(error)}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: {_kind(rows) or 'null'} where a list of objects is needed")
    problems = [
        f"row {number}: {_kind(row) or 'null'} where an object is needed"
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, dict)
    ]
    if problems:
        raise DataError(f"{path}: {len(problems)} entries are not objects\n{listed(problems)}")
    return to_table(rows, None, str(path))


def _read_csv(path: Path) -> Table:
    text = _text(path)
    limit = csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than one long document
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        rows, lines, problems = [], [], []
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                problems.append(f"line {start}: {len(cells)} cells, the header has {len(header)}")
            elif cells:
                rows.append(dict(zip(header, cells, strict=True)))
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not header or len(set(header)) != len(header) or not all(header):
        raise DataError(f"{path}, line 1: column names must be there and differ, found {header}")
    if problems:
        raise DataError(f"{path}: {len(problems)} lines have the wrong number of cells\n{listed(problems)}")
    return to_table(rows, lines, str(path))


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise DataError(
                f"{path}: several columns are called {', '.join(map(repr, twice))}: rename all but one"
            )
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
    try:
        return Table(Dataset(table), str(path))
    except (ValueError, TypeError, NotImplementedError) as error:  # an Arrow type that data sets do not know
        raise DataError(f"{path}: a column cannot be used: {error}") from error


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    # Python reads no integer of more than 4300 digits, and says so in a ValueError
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _excerpt(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 60 else f"{line[:30]} ... {line[-25:]}"


READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
