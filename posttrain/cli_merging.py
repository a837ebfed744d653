"""``posttrain merge``: averages of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli_common import (
    AsJson,
    answers,
    main_process,
    print_json,
    reported_errors,
    stderr,
    stdout,
)


def merge(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
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
    """Average the weights of models of one architecture.

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


def warm(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A configuration of task: reward.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes for all members.", show_default=False),
    ] = None,
    *,
    members: Annotated[int, typer.Option("--members", min=1, help="Reward models to train.")] = 4,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=V1,V2,...",
            help="Values that members take in turn, such as model.adapter.dropout=0,0.1. Seeds always "
            "differ; learning rates are 1 and 0.4 times trainer.learning_rate unless they are varied here.",
        ),
    ] = None,
    starts: Annotated[
        list[str] | None,
        typer.Option("--start", help="Checkpoints of one supervised run that members begin at, in turn."),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", metavar="KEY=VALUE", help="A change for the stage that trains the head."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repetitions; five give intervals.")] = 1,
    shares: Annotated[
        list[float] | None,
        typer.Option("--share", help="Interpolations that are looked at; 0.25, 0.5 and 0.75 when unset."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Accuracy an interpolation may lie below the line.")
    ] = 0.02,
    floor: Annotated[
        float, typer.Option("--min-accuracy", help="Accuracy a member has to exceed to be averaged.")
    ] = 0.5,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; RUN_DIR-warm when unset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train several reward models and average them (WARM).

    \b
    posttrain warm reward.yaml --members 6 --vary trainer.learning_rate=1e-4,4e-5

    WARM is arXiv 2401.12187. One head is trained on frozen features first; all members begin with it. Members
    that are no better than chance, or not linearly connected with the best, are left out. The average in
    OUT/model is compared with members and their ensemble on held-out pairs, and is a reward model like any
    other: rewards: [model:OUT/model], posttrain best-of. The same command goes on where it stopped.
    """
    with reported_errors("the same command goes on where it stopped"):
        from posttrain.run.warm import plan_warm, print_warm
        from posttrain.run.warm import warm as carry_out

        plan = plan_warm(
            config,
            overrides or (),
            members=members,
            vary=vary or (),
            starts=starts or (),
            probe=probe or (),
            seeds=seeds,
            shares=shares or (0.25, 0.5, 0.75),
            tolerance=tolerance,
            floor=floor,
            out=out,
        )
        errors = stderr()
        with answers(as_json):
            result = carry_out(plan, say=lambda text: errors.print(text, markup=False))
        if not main_process():
            return
        if as_json:
            print_json(result)
        else:
            print_warm(result, stdout())


def best_of(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="What samples: folder, run directory, or Hub id.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes on top of the file.", show_default=False),
    ] = None,
    *,
    rewards: Annotated[
        list[str],
        typer.Option("--reward", help="A reward model that picks; several are compared.", show_default=False),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Data, evaluate, and rewards, whose first judges the picks; that of the run when unset.",
        ),
    ] = None,
    sizes: Annotated[
        list[int] | None, typer.Option("--n", min=1, help="Sizes; 1, 4 and 16 when unset. The largest is N.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Write the best of N per prompt here, rows for training.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample N answers per prompt and let reward models pick.

    \b
    posttrain best-of runs/sft --config eval.yaml --reward runs/reward-warm/model --n 4 --n 64

    All reward models pick among the same samples of the held-out prompts. The first of 'rewards' in the
    configuration judges the picks; without it --to is what is left.
    """
    with reported_errors():
        from posttrain.config.check import load_run_config
        from posttrain.run.best_of import best_of as carry_out
        from posttrain.run.best_of import print_best_of
        from posttrain.run.verbs import config_of

        run_config = load_run_config(config or config_of(model), overrides or ())
        with answers(as_json):
            result = carry_out(model, rewards, run_config, sizes=sorted({*(sizes or (1, 4, 16))}), out=to)
        if not main_process():
            return
        if as_json:
            print_json(result)
        else:
            print_best_of(result, stdout())
