"""``posttrain delta`` and ``posttrain sparsity``: weights a training changed, as files and as a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli_common import AsJson, answers, print_json, reported_errors, request_error, stdout

if TYPE_CHECKING:
    from posttrain.selection.delta_file import DeltaFile

delta_app = typer.Typer(
    help="Files that hold only the weights a training changed.\n\n"
    "\b\n"
    "posttrain delta make base runs/mine --to change.safetensors\n"
    "posttrain delta apply change.safetensors --to rebuilt\n\n"
    "They give the trained checkpoint to the bit, on the base they were made of and on no other. "
    "posttrain export RUN --format delta writes one with tokenizer and card.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Before = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="The model before: folder, run directory or Hub id.", show_default=False
    ),
]
After = Annotated[
    str,
    typer.Argument(
        metavar="TUNED", help="The model after training; full weights, not an adapter.", show_default=False
    ),
]
Delta = Annotated[
    Path, typer.Argument(metavar="DELTA", help="Delta file, or folder with one.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option("--base", help="Where the base lies; the address in the file when unset.")
]
OldValues = Annotated[
    bool,
    typer.Option("--old-values", help="Also keep the base's values: removable without it, but larger."),
]
MaxDensity = Annotated[
    float, typer.Option("--max-density", min=0, max=1, help="Refuse when a larger share changed.")
]
ToFile = Annotated[
    Path, typer.Option("--to", help="File to write, or an existing folder for it.", show_default=False)
]
ToFolder = Annotated[Path, typer.Option("--to", help="Folder to write; new or empty.", show_default=False)]


@delta_app.command()
def make(
    base: Before,
    tuned: After,
    to: ToFile,
    old_values: OldValues = False,
    max_density: MaxDensity = 0.5,
    as_json: AsJson = False,
) -> None:
    """Write what differs, bit for bit, between two checkpoints."""
    with reported_errors():
        from posttrain.run.verbs import model_of
        from posttrain.selection.delta import write_delta

        path = _file(to)
        with answers(as_json):
            write_delta(model_of(base), model_of(tuned), path, old_values=old_values, max_density=max_density)
        _answer(path, as_json)


@delta_app.command()
def apply(delta: Delta, to: ToFolder, base: Base = None, as_json: AsJson = False) -> None:
    """Write the trained checkpoint: the base with the delta on it."""
    with reported_errors():
        from posttrain.selection.delta_apply import apply_delta

        with answers(as_json):
            header = apply_delta(delta, to, base=base)
        _say({"folder": str(to), "changed": header.changed}, as_json)


@delta_app.command()
def remove(
    delta: Delta,
    tuned: Annotated[
        Path,
        typer.Argument(metavar="TUNED", help="The checkpoint that has the delta on it.", show_default=False),
    ],
    to: ToFolder,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Write the base again, from a checkpoint with the delta on it."""
    with reported_errors():
        from posttrain.selection.delta_apply import remove_delta

        with answers(as_json):
            header = remove_delta(delta, tuned, to, base=base)
        _say({"folder": str(to), "changed": header.changed}, as_json)


@delta_app.command()
def merge(
    deltas: Annotated[
        list[Path], typer.Argument(metavar="DELTA", help="Deltas of one base.", show_default=False)
    ],
    to: ToFile,
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Factor of a delta, one per delta in their order; 1 when unset."),
    ] = None,
    base: Base = None,
    old_values: OldValues = False,
    max_density: MaxDensity = 0.5,
    as_json: AsJson = False,
) -> None:
    """Add up deltas of one base, or scale one.

    The result is base + sum of weight * (trained - base), rounded once.
    """
    with reported_errors():
        from posttrain.selection.delta import merge_deltas

        path = _file(to)
        with answers(as_json):
            merge_deltas(
                deltas, path, weights=weights, base=base, old_values=old_values, max_density=max_density
            )
        _answer(path, as_json)


@delta_app.command()
def inspect(
    delta: Delta,
    tensors: Annotated[bool, typer.Option("--tensors", help="One row per tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a delta: base, values, size, tensors."""
    with reported_errors():
        _answer(delta, as_json, tensors=tensors)


def _file(to: Path) -> Path:
    from posttrain.models.load import DELTA_FILE

    return to / DELTA_FILE if to.is_dir() else to


def _answer(path: Path, as_json: bool, *, tensors: bool = False) -> None:
    from posttrain.selection.delta_file import DeltaFile

    file = DeltaFile(path)
    facts = _facts(file)
    if as_json:
        rows = {
            name: {
                "shape": touched.shape,
                "dtype": touched.dtype,
                "changed": touched.changed,
                "positions": touched.positions,
                "hash": touched.before,
            }
            for name, touched in file.header.tensors.items()
        }
        _say({**facts, "about": file.header.about, "tensors": rows}, as_json)
        return
    _say({**facts, "tensors": len(file.header.tensors)}, as_json)
    if tensors:
        from rich.table import Table

        table = Table("tensor", "type", "positions", box=None, pad_edge=False)
        for column in ("elements", "changed", "share"):
            table.add_column(column, justify="right")
        for name, touched in file.header.tensors.items():
            share = f"{touched.changed / touched.elements:.2%}"
            numbers = (f"{touched.elements:,}", f"{touched.changed:,}", share)
            table.add_row(name, touched.dtype, touched.positions, *numbers)
        stdout().print(table)


def _facts(file: DeltaFile) -> dict[str, Any]:
    header = file.header
    return {
        "file": str(file.path),
        "base": header.base,
        "revision": header.revision,
        "changed": header.changed,
        "elements": header.elements,
        "density": header.density,
        "old_values": header.old_values,
        "bytes": file.bytes,
        "bytes_per_value": file.bytes / header.changed,
    }


def _say(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    lines = (
        f"{key.replace('_', ' ')}: {_number(value)}" for key, value in facts.items() if value is not None
    )
    stdout().print("\n".join(lines), markup=False, soft_wrap=True)


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def sparsity(
    base: Before,
    tuned: After,
    other: Annotated[
        str | None,
        typer.Option("--other", help="A second run from the same base: how far the changed sets overlap."),
    ] = None,
    tolerances: Annotated[
        list[float] | None,
        typer.Option(
            "--tolerance", min=0, help="Largest difference that counts as none; 0 and 1e-5 when unset."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Type both sides are rounded to: bfloat16, float16, float32, or stored."
        ),
    ] = "bfloat16",
    rank: Annotated[
        bool, typer.Option("--rank", help="Also the rank of each update; hours for a large model.")
    ] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="One row per tensor instead of one per kind.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Report which weights a training changed.

    \b
    posttrain sparsity Qwen/Qwen2.5-0.5B-Instruct runs/mine
    posttrain sparsity base tuned --dtype stored --tensors

    The answer is the share that did not change, per kind of tensor and in all.

    The checkpoints are read from their safetensors shards a block at a time, so size is no obstacle. The type
    they are compared in decides the result and is printed; so is everything that could not be compared.
    """
    with reported_errors():
        from posttrain.evaluation.changes import DTYPES
        from posttrain.evaluation.sparsity import TOLERANCES, compare_checkpoints
        from posttrain.evaluation.sparsity_table import print_sparsity
        from posttrain.run.verbs import model_of

        if dtype not in DTYPES:
            request_error(f"--dtype is one of {', '.join(DTYPES)}, found {dtype!r}")
        report = compare_checkpoints(
            model_of(base),
            model_of(tuned),
            None if other is None else model_of(other),
            tolerances=tolerances or TOLERANCES,
            dtype=dtype,  # type: ignore[arg-type]
            rank=rank,
        )
        if as_json:
            print_json(report.to_dict())
        else:
            print_sparsity(report, stdout(), tensors=tensors)
