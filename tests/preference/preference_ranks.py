"""Run by test_preference_ranks.py, alone and under torchrun: RPO, Flex-DPO, gauges and a probe."""

import sys
from pathlib import Path

import pairs
import support
import torch
from datasets import Dataset

from posttrain.preference.flex_dpo import FlexDPO
from posttrain.preference.rpo import RPO

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, ranks = Path(sys.argv[1]), int(sys.argv[2])
    probe = Dataset.from_dict({"prompt": ["say"] * 5, "completion": [" x" * (1 + i) for i in range(5)]})
    run = pairs.trainer(
        out / str(ranks),
        methods=[RPO(eta=0.05), FlexDPO(beta_rejected=0.05)],
        probe_dataset=probe,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        eval_strategy="steps",
        eval_steps=1,
        eval_data=pairs.rows(4),
        max_steps=3,
    )
    logs = pairs.history(run)
    if run.accelerator.is_main_process:
        weights = support.weights(run.accelerator.unwrap_model(run.model))
        torch.save({"logs": logs, "weights": weights}, out / f"{ranks}.pt")
    support.leave()
