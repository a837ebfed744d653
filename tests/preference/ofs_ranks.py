"""Run by test_preference_ofs_dpo.py, alone and under torchrun: the same global batches."""

import sys
from pathlib import Path

import support
import torch
from test_preference_ofs_dpo import Kept, ofs

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        kept = Kept()
        run = ofs(
            out / f"{name}{ranks}",
            [kept],
            alpha=0.3,
            interval=2,
            slow_lr_ratio=4.0,
            per_device_train_batch_size=4 // ranks,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="sequential",
            max_steps=5,
            beta=0.5,
        )
        run.train()
        found = {"active": kept.active, "end": kept.end, "logs": run.state.log_history}
        torch.save(found, out / f"{name}-{ranks}-{run.accelerator.process_index}.pt")
    support.leave()
