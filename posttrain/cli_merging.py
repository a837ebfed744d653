"""``posttrain merge``: averages of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli_common import AsJson, answers, print_json, reported_errors, stdout


def merge(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Folders of full models or of LoRA adapters of one base; a run stands for its model.",
            show_default=False,
        ),
    ],
    *,
    to: Annotated[Path, typer.Option("--to", help="Folder to write; new or empty.", show_default=False)],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", min=0, help="One per model, in order; equal ones when unset."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Average the weights of several models of one architecture.

    \b
    posttrain merge runs/a runs/b runs/c --to merged
    posttrain merge runs/a runs/b --weight 0.7 --weight 0.3 --to merged

    Sums are in float64 and rounded once; shards are read piece by piece. LoRA adapters are averaged as the
    updates they make, which takes the sum of their ranks. Models that do not belong together (other tensors,
    types, tokenizers, heads or bases) are refused.
    """
    with reported_errors():
        from posttrain.merging.average import average
        from posttrain.run.verbs import model_of

        with answers(as_json):
            merged = average([model_of(member) for member in members], to, weights=weights)
        if as_json:
            print_json(merged.to_dict())
        else:
            shares = ", ".join(f"{weight:.4g}" for weight in merged.weights)
            rank = f", rank {merged.rank}" if merged.rank is not None else ""
            stdout().print(
                f"{merged.kind} average of {len(merged.members)} models ({shares}) in {merged.folder}: "
                f"{merged.parameters:,} weights{rank}",
                markup=False,
                soft_wrap=True,
            )
