"""Run by test_sft_forget_ranks.py, alone and under torchrun: the same global batches, the same examples."""

import sys
from pathlib import Path

import support
import torch
from test_sft_sgtm import rows as labelled
from test_sft_sgtm import trainer as sgtm_trainer
from test_sft_unlearn import rows as marked
from test_sft_unlearn import trainer as unlearn_trainer

from posttrain.selection.ssd import importances
from posttrain.sft.sgtm import SGTM
from posttrain.sft.unlearn import Unlearn

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    ranks = int(sys.argv[2])
    settings = {"max_steps": 3, "per_device_train_batch_size": 8 // ranks, "gradient_accumulation_steps": 2}
    # two ranks deal out the batches of one: a sequential order makes them the same rows
    settings |= {"max_grad_norm": 1.0, "weight_decay": 0.1, "train_sampling_strategy": "sequential"}
    sgtm = SGTM(mlp_units=4, kv_groups=1, retain_mask_prob=0.5, examples=8, at_end="keep")
    # of two ranks one has the rows to forget, the other has not: both go through all modes
    uneven = labelled(48, (True, True, True, True, False, None, False, None))
    draw = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(3, 40, (1, 9), generator=draw)} for _ in range(6)]
    for example in examples:
        example["labels"] = example["input_ids"]
    for name, build in (
        ("unlearn", lambda folder: unlearn_trainer(folder, Unlearn(), data=marked(48), **settings)),
        ("sgtm", lambda folder: sgtm_trainer(folder, sgtm, data=uneven, **settings)),
    ):
        run = build(out / f"{name}{ranks}")
        run.train()
        main = run.accelerator.is_main_process
        if main:
            weights = support.weights(run.accelerator.unwrap_model(run.model))
            torch.save({"weights": weights, "logs": run.state.log_history}, out / f"{name}{ranks}.pt")
    # three rows to forget and three to retain, dealt out 2 + 1 and 1 + 2
    own = slice(None) if ranks == 1 else (slice(0, 2) if main else slice(2, 3))
    other = slice(None) if ranks == 1 else (slice(0, 1) if main else slice(1, 3))
    found = importances(support.model(), examples[:3][own], examples[3:][other])
    assert found.rows == (3, 3), found.rows
    if main:
        both = {f"{kind} {n}": v for kind in ("forget", "full") for n, v in getattr(found, kind).items()}
        torch.save({"weights": both, "logs": []}, out / f"ssd{ranks}.pt")
    support.leave()
