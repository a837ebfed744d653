"""The command line: ``posttrain VERB``.

Exit codes: 0 done, 1 the run failed, 2 the request was wrong (the message says how to put it right). Heavy
imports stand inside the verbs, so that help and ``check`` answer at once.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain import __version__
from posttrain.cli_common import (
    AsJson,
    answers,
    first_on_this_machine,
    loading,
    main_process,
    print_json,
    reported_errors,
    request_error,
    stderr,
    stdout,
)
from posttrain.cli_delta import delta_app, sparsity
from posttrain.cli_doctor import doctor
from posttrain.cli_merging import best_of, merge, warm
from posttrain.cli_plan import plan_app
from posttrain.cli_samples import samples

# the order of the help: from a first run to what few need
ORDER = (
    *("check", "train", "samples", "report", "doctor", "eval", "export", "methods"),
    *("compare", "continual", "warm", "best-of", "s3ft", "merge", "delta", "plan", "sparsity"),
)


class Verbs(typer.core.TyperGroup):
    """The verbs in the order in which they are met."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of ``ORDER``."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="posttrain",
    cls=Verbs,
    help="LLM post-training methods that compose, on top of TRL.\n\n"
    "A run is one YAML file. Check it first, then train:\n\n"
    "\b\n"
    "posttrain check configs/rlvr/quickstart.yaml\n"
    "posttrain train configs/rlvr/quickstart.yaml trainer.learning_rate=2e-4\n\n"
    "Exit codes: 0 done, 1 the run failed, 2 the request was wrong. All verbs take --json; "
    "posttrain VERB --help explains one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(delta_app, name="delta")
app.add_typer(plan_app, name="plan")
app.command()(doctor)
app.command()(samples)
app.command()(sparsity)
app.command()(merge)
app.command()(warm)
app.command("best-of")(best_of)

OVERRIDES_HELP = (
    "Changes on top of the file, with YAML values: trainer.learning_rate=1e-5, rewards=[verifier], "
    "methods.ace.alpha=0.5. null drops an optional section (evaluate=null); for a method it "
    "means its defaults; methods=[] drops all methods. A mapping merges with what is there "
    "(methods={spine: {}} keeps ACE), a list or value replaces it (methods=[spine]); so does a selector."
)
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help=OVERRIDES_HELP, show_default=False)
]
Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", show_default=False)
]


def load_config(path: Path, overrides: list[str] | None) -> Any:
    """Return the checked configuration; its warnings are printed on stderr."""
    from posttrain.config.check import check_and_load
    from posttrain.config.problems import ConfigError

    report, config = check_and_load(path, overrides or ())
    if config is None:
        raise ConfigError(report)
    if report.problems and first_on_this_machine():
        report.print(stderr())
    return config


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Keeps ``posttrain VERB`` a group however many verbs there are."""


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Then also look at tokenizer, data and shapes of the model: what trains, what is cut, how "
            "many steps. Takes seconds to a minute; no weights are loaded.",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="With --deep: cpu or cuda, what the memory forecast is for; auto: what is here."
        ),
    ] = "auto",
    launch: Annotated[
        Path | None,
        typer.Option(
            "--launch",
            metavar="FILE",
            help="Check as for 'accelerate launch --config_file FILE': its processes, and how it shards.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Report every mistake in a configuration at once.

    \b
    posttrain check run.yaml
    posttrain check --deep run.yaml model.adapter.r=8
    posttrain check run.yaml --launch configs/accelerate/zero3.yaml

    Without --deep nothing is loaded; nothing is ever written. Names, types and ranges are checked: the
    trainer section against the fields of the installed TRL, each method against its parameters and the rest
    of the run and the way it is launched, and the batch arithmetic for WORLD_SIZE processes (1 when unset).
    Each mistake comes with its file and line, what is allowed and the nearest valid name.

    Exit code 0 when the run can start (warnings allowed), 2 when it cannot.
    """
    from posttrain.config.check import check_and_load
    from posttrain.config.launch import as_launched

    if device not in ("auto", "cpu", "cuda"):
        request_error(f"--device is auto, cpu or cuda, found {device!r}")
    with ExitStack() as stack:
        try:
            stack.enter_context(as_launched(launch))
        except ValueError as error:
            request_error(str(error))
        report, checked = check_and_load(config, overrides or ())
        if not as_json:
            report.print(stdout())
        if not deep or checked is None:
            if as_json:
                print_json(report.as_json())
            raise typer.Exit(0 if report.ok else 2)
        stack.enter_context(reported_errors())
        import torch

        from posttrain.deep.check import deep_check
        from posttrain.deep.show import print_deep

        here = "cuda" if torch.cuda.is_available() else "cpu"
        with answers(as_json):
            found = deep_check(checked, here if device == "auto" else device)  # type: ignore[arg-type]
        if as_json:
            print_json(report.as_json() | {"ok": found.ok, "deep": found.as_json()})
        else:
            print_deep(found, stdout())
        raise typer.Exit(0 if found.ok else 2)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on exactly where the run in run_dir stopped, whatever stopped it."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in run_dir; it is kept once, as RUN_DIR.old.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Carry out a run, from warm start to export and report.

    \b
    posttrain train run.yaml
    posttrain train run.yaml trainer.max_steps=20 run_dir=runs/short
    posttrain train run.yaml --resume
    accelerate launch --config_file configs/accelerate/ddp.yaml -m posttrain train run.yaml

    The configuration is checked first; every mistake is reported before anything is loaded. Then come
    warm start, evaluation, training, evaluation, export and report. Everything the run writes lies in its
    run_dir.
    """
    with reported_errors("go on with --resume") as hints:
        if resume and overwrite:
            request_error("--resume goes on with a run and --overwrite replaces it: give one of them")
        run_config = load_config(config, overrides)
        hints.append(f"posttrain doctor {run_config.run_dir} says what to try")
        with loading():
            from posttrain.run.train import train as carry_out

        with answers(as_json):
            result = carry_out(run_config, resume=resume, overwrite=overwrite)
        if not main_process():
            return
        if as_json:
            print_json(result.to_dict())
        else:
            stdout().print(result.text(), markup=False, soft_wrap=True)


@app.command("eval")
def evaluate_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint or adapter folder, run directory, or Hub id.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Run configuration with data, rewards and evaluate; that of the run when unset."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the evaluation with all samples here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a model on held-out rows, with intervals.

    \b
    posttrain eval runs/mine
    posttrain eval Qwen/Qwen2.5-0.5B-Instruct --config run.yaml evaluate.samples=32

    On problems: pass@k, maj@k, coverage, diversity. On pairs: accuracy, margins, KL from the start, win rate,
    calibration.
    """
    with reported_errors():
        from posttrain.run.verbs import config_of, evaluate_path

        run_config = load_config(config or config_of(model), overrides)
        with answers(as_json):
            result = evaluate_path(model, run_config, out=out)
        if not main_process():
            return
        if as_json:
            print_json({key: value for key, value in result.to_dict().items() if key != "problems"})
        else:
            from posttrain.evaluation.table import print_table

            print_table({"": result}, stdout())


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="Run directory, a checkpoint of one, or an export.", show_default=False
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Target folder; RUN/export when unset, RUN/export-FORMAT with --format."),
    ] = None,
    export_format: Annotated[
        str, typer.Option("--format", help="auto, adapter, merged, full or delta.")
    ] = "auto",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="What a delta is against, the run's model.path when unset; or the Hub address of an "
            "adapter's base that lies in a folder.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option("--push", help="Hub repository user/name to upload to; of SOURCE, if it is an export."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Publish for everybody; private when unset.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a trained model for others, reload it, upload it.

    \b
    posttrain export runs/mine
    posttrain export runs/mine --format merged --to merged
    posttrain export runs/mine --push me/my-model

    The logits of what was written are compared with those of the model that was trained. It is uploaded only
    with --push; a repository that this makes is private unless --public is given.
    """
    with reported_errors("repeat the command; an earlier export is as it was"):
        from posttrain.run.verbs import EXPORT_FORMATS, export_path

        if export_format not in EXPORT_FORMATS:
            request_error(f"--format is one of {', '.join(EXPORT_FORMATS)}, found {export_format!r}")
        if base is not None and export_format in ("merged", "full"):
            request_error(f"--base goes with an adapter or --format delta, found --format {export_format}")
        with answers(as_json):
            result = export_path(
                source, to=to, format=export_format, push_to=push_to, private=not public, base=base
            )
        if as_json:
            print_json(result)
        else:
            lines = (f"{key}: {value}" for key, value in result.items() if value is not None)
            stdout().print("\n".join(lines), markup=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="One run directory, or several to compare.", show_default=False),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; RUN/report.html when unset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn run directories into one self-contained HTML page.

    \b
    posttrain report runs/mine
    posttrain report runs/grpo runs/ace --out both.html
    """
    with reported_errors():
        from posttrain.report import write_report

        try:
            path = write_report(runs, out)
        except (FileNotFoundError, ValueError) as error:
            request_error(str(error))
        if as_json:
            print_json({"report": str(path)})
        else:
            stdout().print(str(path), markup=False, soft_wrap=True)


@app.command()
def compare(
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes for all arms.", show_default=False),
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME:KEY=VALUE,...",
            help="An arm and its changes; give several. The first is what the others are compared with.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per arm; five and more give intervals.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the comparison; RUN_DIR-compare when unset.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time.")] = 1,
    share: Annotated[
        str,
        typer.Option("--share-warm-start", help="Where arms agree on it: once for all, per-seed, or no."),
    ] = "once",
    as_json: AsJson = False,
) -> None:
    """Run arms x seeds on the same data, compared seed by seed.

    \b
    posttrain compare CONFIG.yaml --arm grpo:methods=[] --arm ace:methods.ace.alpha=1 --seeds 5

    Each run is a normal one, in OUT/ARM/seed-S. The table and OUT/report.html give means over seeds and
    paired differences with 95 % t intervals. The same command goes on with a comparison that was stopped;
    more seeds or arms extend it. Exit code 1 when a run failed; the others are reported all the same.
    """
    with reported_errors():
        from posttrain.run.arms import SHARES, parse_arm, plan

        if share not in SHARES:
            request_error(f"--share-warm-start is one of {', '.join(SHARES)}, found {share!r}")
        parsed = [parse_arm(text) for text in arms or ()]
        planned = plan(
            config,
            parsed,
            seeds=seeds,
            out=out,
            overrides=overrides or (),
            share=share,  # type: ignore[arg-type]
        )
        from posttrain.run.compare import compare as carry_out

        errors = stderr()
        try:
            result = carry_out(planned, jobs=jobs, say=lambda text: errors.print(text, markup=False))
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on where it stopped", markup=False)
            raise typer.Exit(1) from None
        if as_json:
            print_json(result.to_dict())
        else:
            result.print(stdout())
        raise typer.Exit(0 if result.ok else 1)


@app.command()
def continual(
    rounds: Annotated[
        list[Path],
        typer.Argument(metavar="CONFIG", help="One configuration per round, in order.", show_default=False),
    ],
    *,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME[:KEY=VALUE,...]", help="One per arm; the first is the baseline."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Trained first, once per seed; all arms begin from it."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds per arm; five and more give intervals.")] = 5,
    out: Annotated[Path, typer.Option("--out", help="Folder of the sequence.")] = Path("runs/continual"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change for all rounds and arms.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on tasks in a row: what is learned, what is forgotten.

    \b
    posttrain continual A.yaml B.yaml --arm full --arm hft:selection=hft --arm lora:model.adapter.r=8

    Each round begins from the model of the one before; selectors that draw per round draw anew. After each
    round every task is evaluated. Table and OUT/continual.json: accuracy learned and kept, forgetting,
    general loss, per arm and as paired differences with 95 % t intervals. The same command goes on where it
    stopped.
    """
    with reported_errors("the same command goes on where it stopped"):
        from posttrain.run.arms import parse_arm
        from posttrain.run.continual import continual as carry_out
        from posttrain.run.continual import plan_sequence, print_sequence

        parsed = [parse_arm(text) for text in arms or ()]
        planned = plan_sequence(rounds, parsed, base=base, seeds=seeds, out=out, overrides=overrides or ())
        errors = stderr()
        with answers(as_json):
            result = carry_out(planned, say=lambda text: errors.print(text, markup=False))
        if as_json:
            print_json(result)
        else:
            print_sequence(result, stdout())


@app.command()
def s3ft(
    config: Config,
    overrides: Overrides = None,
    *,
    to: Annotated[
        Path,
        typer.Option("--to", help="File to write, rows.jsonl; the counts go beside it.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Write training rows with own answers in place of gold (S3FT).

    \b
    posttrain s3ft run.yaml --to rows.jsonl

    The configuration has an 's3ft' section; nothing is trained.

    Own answers stand where the first reward finds them right, rephrasings of the gold answer where those are,
    gold answers elsewhere. The same command goes on with a job that was stopped, and does nothing when it is
    done. Train on the rows with data: {source: rows.jsonl}; they are rendered already, so without columns,
    prompt_template and system_prompt.
    """
    with reported_errors("the same command goes on where it stopped"):
        run_config = load_config(config, overrides)
        from posttrain.run.rewriting import rewrite_to

        with answers(as_json):
            result = rewrite_to(run_config, to)
        if not main_process():
            return
        if as_json:
            print_json(result)
        else:
            shares = ", ".join(f"{name} {share:.1%}" for name, share in result["shares"].items())
            lines = [f"{result['rows']} rows in {result['rows_file']}: {shares}"]
            for stage, counts in result["outcomes"].items():
                told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                lines.append(f"answers of stage {stage}: {told}")
            for key in ("judge_failed", "retokenised_differently"):
                lines.append(f"{key.replace('_', ' ')}: {result[key]}")
            stdout().print("\n".join(lines), markup=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Such as ace, or package.module:ClassName.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, or explain one.

    \b
    posttrain methods
    posttrain methods ace

    Without NAME: one row per method with its paper and parameters. With NAME: its page (the idea, the
    formula, where the defaults come from, what it needs, what it composes with, when not to use it) and the
    table of its parameters.
    """
    from posttrain.config import method_pages

    if name is None:
        known = method_pages.available()
        if as_json:
            print_json([method_pages.as_json(cls) for cls in known.values()])
        else:
            method_pages.print_list(known.values(), stdout())
        return
    try:
        cls = method_pages.resolve(name)
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
