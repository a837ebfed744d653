"""The sparsity report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from posttrain.evaluation.changes import Counts
from posttrain.evaluation.sparsity import SparsityReport, kind_of


def print_sparsity(report: SparsityReport, console: Console, *, tensors: bool = False) -> None:
    """Print the totals, one row per kind of tensor, the overlap, and what is not in the numbers.

    Args:
        report: What to print.
        console: Where.
        tensors: One row per tensor instead of one per kind.
    """
    total = report.total
    for path, kinds in report.stored.items():
        stored = ", ".join(f"{count} tensors in {kind}" for kind, count in kinds.items())
        console.print(f"{path}: {stored}", markup=False)
    as_stored = "the coarsest type in which each tensor is stored"
    console.print(
        f"compared in {as_stored if report.dtype == 'stored' else report.dtype}: {len(report.tensors)} "
        f"tensors, {total.elements:,} elements"
        + ("" if report.mean_rank is None else f"; mean update rank {report.mean_rank:.1%} of full"),
        markup=False,
    )
    console.print("sparsity: share of elements with |after - before| <= tau\n", markup=False)
    rows: Mapping[str, Counts] = (
        {tensor.name: tensor.counts for tensor in report.tensors} if tensors else report.grouped(kind_of)
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor" if tensors else "kind of tensor", overflow="fold")
    table.add_column("elements", justify="right")
    for tau in report.tolerances:
        table.add_column(f"tau = {tau:g}", justify="right")
    ranks = {tensor.name: tensor.rank for tensor in report.tensors}
    with_rank = tensors and any(rank is not None for rank in ranks.values())
    if with_rank:
        table.add_column("update rank", justify="right")
    for name, counts in {**rows, "all": total}.items():
        cells = [f"{share:.2%}" for share in counts.sparsity]
        if with_rank:
            rank = ranks.get(name)
            cells.append("-" if rank is None else f"{rank:.1%}")
        table.add_row(name, f"{counts.elements:,}", *cells)
    console.print(table)
    if report.overlaps:
        _print_overlap(report, console)
    if report.excluded:
        base, tuned = (
            sum(item.base_elements for item in report.excluded),
            sum(item.tuned_elements for item in report.excluded),
        )
        console.print(
            f"\nnot compared: {len(report.excluded)} tensors ({base:,} elements of the base, {tuned:,} of "
            f"the tuned model)",
            markup=False,
        )
        for item in report.excluded:
            console.print(f"  {item.name}: {item.reason}", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def _print_overlap(report: SparsityReport, console: Console) -> None:
    console.print(f"\noverlap of the changed sets of {report.tuned} (1) and {report.other} (2)", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("tau", "|1 ∩ 2| / |1|", "by chance", "|1 ∩ 2| / |2|", "by chance", "Jaccard"):
        table.add_column(title, justify="right")
    for overlap in report.overlaps:
        values = overlap.to_dict()
        cells = [values[key] for key in ("o1", "chance_o1", "o2", "chance_o2", "jaccard")]
        table.add_row(
            f"{overlap.tolerance:g}", *("-" if value is None else f"{value:.2%}" for value in cells)
        )
    console.print(table)
