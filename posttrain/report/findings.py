"""What in a run asks for attention before its numbers are believed, with the likely cause and what to try."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.report import evaluation
from posttrain.report.load import Run

if TYPE_CHECKING:
    from posttrain.doctor.finding import Finding


def findings(run: Run) -> list[Finding]:
    """Return what ``posttrain doctor`` finds in the files of a run, the gravest first.

    Weights, checkpoints and the machine are left to the doctor: they are gone or others where a page is read.
    """
    # the doctor reads runs with posttrain.report.load: imported late, or the two packages need each other
    from posttrain.doctor import run as doctor
    from posttrain.doctor.finding import Finding, ordered
    from posttrain.run.directory import RunDirectory

    folder = RunDirectory(run.path)
    patient = doctor.Patient(
        folder, doctor.state_of(folder, run, run.config), run, run.warm_start, run.config
    )
    checks = (
        doctor.ending, doctor.numbers, doctor.nonfinite_rows, doctor.evaluation, doctor.rewarded_emptiness,
    )  # fmt: skip
    found = [Finding("evaluation", "warning", text, "", advice) for text, advice in evaluation.alarms(run)]
    return ordered([*found, *(finding for check in checks for finding in check(patient))])
