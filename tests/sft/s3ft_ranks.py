"""Run by test_sft_s3ft.py under torchrun: the rows of two processes, in one file."""

import sys
from pathlib import Path

import support
import torch
from test_sft_s3ft import Judge, ending, job

from posttrain.rewards.reward import VerifierFailure

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), None
    model, rows = ending(), support.answers(23)
    work = job(model, out / "ranks.jsonl")
    new = work.carry_out(rows)
    rank = torch.distributed.get_rank()
    assert len(new) == 23
    (out / f"rank-{rank}.json").write_text(repr((new.to_list(), work.statistics)))
    # a judge that breaks on one rank stops both
    try:
        judge = Judge(fail=lambda text: rank == 1, max_failures=0.0)
        job(model, out / "broken.jsonl", judge).carry_out(rows)
    except VerifierFailure:
        (out / f"stopped-{rank}").touch()
    support.leave()
