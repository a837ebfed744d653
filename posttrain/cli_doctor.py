"""``posttrain doctor``: what is wrong with this machine, or with a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from posttrain.cli_common import AsJson, answers, print_json, reported_errors, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.doctor.machine import Machine


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN_DIR", help="A run; without it, this machine.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with this machine or a run, and what to try.

    \b
    posttrain doctor
    posttrain doctor runs/mine

    Without RUN_DIR: versions against the tested ranges, devices, memory, disks, settings that change a
    launch, and combinations known to fail. With RUN_DIR, also while it runs: how it ended, what its numbers
    say (dead groups, collapsed entropy, cut completions, spikes, a constant reward, a learning rate of
    nothing), whether its weights are whole and have moved.

    Exit code 0 without errors among the findings (warnings and notes allowed), 1 with errors, 2 when RUN_DIR
    is no run.
    """
    with reported_errors():
        from posttrain.doctor.finding import has_errors, ordered, print_findings

        if run is None:
            from posttrain.doctor.combinations import judge
            from posttrain.doctor.machine import look

            with answers(as_json):
                machine = look()
                findings = judge(machine)
            if as_json:
                print_json(
                    {"machine": machine.to_dict(), "findings": [row.to_dict() for row in ordered(findings)]}
                )
            else:
                _print_machine(machine, stdout())
                print_findings(findings, stdout(), "nothing is wrong")
        else:
            from posttrain.doctor.run import examine

            state, findings = examine(run)
            if as_json:
                print_json({"run": state.to_dict(), "findings": [row.to_dict() for row in ordered(findings)]})
            else:
                stdout().print(state.text(), markup=False, soft_wrap=True)
                print_findings(findings, stdout(), "nothing was found")
        raise typer.Exit(1 if has_errors(findings) else 0)


def _print_machine(machine: Machine, console: Console) -> None:
    ranges = {row.package: row.needed for row in machine.requirements if row.by == "posttrain"}
    table = Table("package", "installed", "tested with", box=None, pad_edge=False)
    for name, version in machine.versions.items():
        needed = machine.python_range if name == "python" else ranges.get(name, "")
        table.add_row(name, version or "-", needed)
    console.print(table)
    rows = [("torch build", machine.torch_build or "does not import")]
    for index, gpu in enumerate(machine.gpus):
        bits = "bf16" if gpu.bf16 else "no bf16"
        capability = ".".join(map(str, gpu.capability))
        rows.append(
            (f"gpu {index}", f"{gpu.name}, {gpu.memory_gib} GiB ({gpu.free_gib} free), {capability}, {bits}")
        )
    if not machine.gpus:
        rows.append(("gpus", machine.accelerator or "none"))
    if machine.driver:
        rows.append(("driver", machine.driver))
    quota = "" if machine.quota is None else f", quota {machine.quota:g}"
    limit = "" if machine.memory_limit_gib is None else f", limit {machine.memory_limit_gib}"
    rows += [
        ("processor", f"{machine.processor}, {machine.cores} cores{quota}, torch threads {machine.threads}"),
        ("memory", f"{machine.memory_gib} GiB{limit}, /dev/shm {machine.shared_gib} GiB"),
        *(
            (f"disk: {disk.use}", f"{disk.free_gib} of {disk.total_gib} GiB free, {disk.path}")
            for disk in machine.disks
        ),
        (
            "hub",
            f"{'offline' if machine.offline else 'online'}, token {'present' if machine.token else 'absent'}",
        ),
        ("environment", " ".join(f"{name}={value}" for name, value in machine.environment.items()) or "-"),
        ("accelerate default", str(machine.launch.get("path", "none"))),
        ("python", f"{machine.executable}, posttrain from {machine.package}"),
    ]
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows:
        facts.add_row(name, value)
    console.print(facts)
    console.print()
