"""``posttrain samples``: what a run's model answers, in the terminal."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli_common import AsJson, print_json, reported_errors, request_error, stderr, stdout


def samples(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run, also while it trains.")],
    *,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many at most.")] = 8,
    step: Annotated[
        int | None,
        typer.Option("--step", help="Those of the log nearest to this step; the newest when unset."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", help="correct, wrong, unparseable, error, timeout or skipped: the newest of these."
        ),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Of the last held-out evaluation instead of training.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new ones as the run writes them.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show sampled completions with prompt, rewards and verdict.

    \b
    posttrain samples runs/mine                 # the newest
    posttrain samples runs/mine --follow        # as they come; ends with the run, or by Ctrl-C
    posttrain samples runs/mine --only wrong -n 20
    posttrain samples runs/mine --step 10       # what it answered then

    Green is correct, red wrong, yellow unread. With --json a list, with --follow one object per line.
    """
    with reported_errors():
        from posttrain.report.samples import at_step, newest, print_samples, require_run
        from posttrain.report.samples import follow as following
        from posttrain.report.samples import held_out as evaluated
        from posttrain.rewards.verdict import STATUSES
        from posttrain.run.directory import finite, held

        if only is not None and only not in STATUSES:
            request_error(f"--only is one of {', '.join(STATUSES)}, found {only!r}")
        if follow and (step is not None or held_out):
            request_error("--follow shows what comes: leave out --step and --held-out")
        found = require_run(run)
        # before the newest are read, so that none falls between the two
        coming = following(found, lambda: held(found), status=only) if follow else iter(())
        if held_out:
            rows = evaluated(found, count=count, status=only)
        elif step is not None:
            rows = at_step(found, step, count=count, status=only)
        else:
            rows = newest(found, count=count, status=only)
        if as_json and not follow:
            print_json(finite(rows))
            return
        if not rows and not follow:
            where = found.evaluation if held_out else found.completions
            what = f"no {only} completions" if only else "no completions"
            hint = "" if held_out else "; runs that do not sample answers have them under --held-out at most"
            stderr().print(f"{what} in {where}{hint}", markup=False)
            return
        try:
            for row in itertools.chain(rows, coming):
                if as_json:
                    print_json(finite(row), indent=None)
                else:
                    print_samples([row], stdout(), full=full)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
