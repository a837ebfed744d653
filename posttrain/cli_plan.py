"""``posttrain plan``: files that say which weights may train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli_common import AsJson, answers, print_json, reported_errors, stdout

plan_app = typer.Typer(
    help="Files that say which weights may train.\n\n"
    "\b\n"
    "posttrain plan make run.yaml --to plan.safetensors\n"
    "posttrain train run.yaml selection.plan=plan.safetensors\n\n"
    "A plan made on one machine is used on another with selection: {plan: FILE}; it fits the weights it was "
    "made for and no others.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@plan_app.command()
def make(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="Configuration with a 'selection' section.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes on top of the file.", show_default=False),
    ] = None,
    *,
    to: Annotated[Path, typer.Option("--to", help="File to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Make the plan of a configuration, without training."""
    with reported_errors():
        from posttrain.config.check import load_run_config
        from posttrain.run.planning import make_plan

        with answers(as_json):
            plan = make_plan(load_run_config(config, overrides or ()))
            to.parent.mkdir(parents=True, exist_ok=True)
            plan.save(to)
        _show(to, as_json)


@plan_app.command()
def inspect(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="Plan file, such as RUN/selection.safetensors.", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a plan selects, and what it was made with."""
    with reported_errors():
        _show(plan, as_json)


def _show(path: Path, as_json: bool) -> None:
    from posttrain.selection.plan import SelectionPlan

    plan = SelectionPlan.load(path)
    if as_json:
        print_json(
            {
                "file": str(path),
                "method": plan.method,
                "config": dict(plan.config),
                "selected": plan.count,
                "scalars": plan.numel,
                "density": plan.density,
                "base_hash": plan.base_hash,
                "fingerprint": plan.fingerprint(),
                "tensors": {
                    name: {"kind": part.kind, "shape": list(part.shape), "selected": part.count}
                    for name, part in plan.tensors.items()
                },
            }
        )
        return
    settings = ", ".join(f"{key}={value!r}" for key, value in plan.config.items())
    stdout().print(plan.summary(), markup=False, soft_wrap=True, highlight=False)
    stdout().print(f"made with {settings or 'no settings'}", markup=False, soft_wrap=True, highlight=False)
