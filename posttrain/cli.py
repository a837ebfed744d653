"""The command line: ``posttrain VERB``.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong (the message says how to put it right). Heavy
imports stand inside the verbs, so that help and ``check`` answer at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="posttrain",
    help="LLM post-training methods that compose, on top of TRL.\n\n"
    "A run is one YAML file. Check it first, then train:\n\n"
    "    posttrain check CONFIG.yaml\n\n"
    "    posttrain train CONFIG.yaml trainer.learning_rate=2e-6",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

OVERRIDES_HELP = (
    "Changes on top of the file, with YAML values: trainer.learning_rate=1e-5, rewards=[verifier], "
    "methods.ace.alpha=0.5. null drops an optional section (evaluate=null); for a method it "
    "means its defaults; methods=[] drops all methods."
)
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES_HELP, show_default=False)
]
Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]


def stdout() -> Console:
    """Return the console for answers; a pipe has no width, and 80 columns would fold every table cell."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def request_error(message: str) -> NoReturn:
    """Say on stderr what is wrong with the request, and end with exit code 2."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False)
    raise typer.Exit(2)


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@app.callback()
def _program() -> None:
    """Keeps ``posttrain VERB`` a group however many verbs there are."""


@app.command()
def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Report every mistake in a configuration at once.

    Nothing is loaded and nothing is written. Names, types and ranges are checked: the trainer section against
    the fields of the installed TRL, each method against its parameters and the rest of the run, and the batch
    arithmetic for WORLD_SIZE processes (1 when unset). Each mistake comes with its file and line, what is
    allowed and the nearest valid name.

    Exit code 0 when the run can start (warnings allowed), 2 when it cannot.
    """
    from posttrain.config.check import check_config

    report = check_config(config, overrides or ())
    if as_json:
        print_json(report.as_json())
    else:
        report.print(stdout())
    raise typer.Exit(0 if report.ok else 2)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Such as ace, or package.module:ClassName.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or explain one.

    Without NAME: one row per method with its paper and parameters. With NAME: its page (the idea, the
    formula, where the defaults come from, what it needs, what it composes with, when not to use it) and the
    table of its parameters.
    """
    from posttrain.config import method_pages
    from posttrain.rl import registry

    if name is None:
        known = registry.available()
        if as_json:
            print_json([method_pages.as_json(cls) for cls in known.values()])
        else:
            method_pages.print_list(known.values(), stdout())
        return
    try:
        cls = registry.resolve(name)
    except (KeyError, TypeError) as error:
        request_error(f"{error.args[0]} ('posttrain methods' lists them)")
    if as_json:
        print_json(method_pages.as_json(cls))
    else:
        method_pages.print_page(cls, stdout())


def main() -> None:
    """Run the command line; the entry point of the ``posttrain`` script."""
    # functions and methods of the user (python:my_rewards.score) lie where the command is run
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    app()
