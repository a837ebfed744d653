"""Run by test_preference_feasible.py, alone and under torchrun: the same global batches."""

import sys
from pathlib import Path

import pairs
import support
import torch

from posttrain.preference.feasible import Feasible

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    for name, count in (("", 8), ("odd-", 10)):
        method = Feasible(tolerance=0.5, dual_lr=0.5, alpha=2.0)
        run = pairs.trainer(
            out / f"{name}{ranks}",
            methods=[method],
            data=pairs.rows(count),
            num_train_epochs=2,
            max_steps=-1,
            per_device_train_batch_size=4 // ranks,
            train_sampling_strategy="sequential",
            beta=1.0,
            learning_rate=3e-3,
        )
        run.train()
        torch.save(method.state_dict(), out / f"{name}{ranks}-{run.accelerator.process_index}.pt")
    support.leave()
