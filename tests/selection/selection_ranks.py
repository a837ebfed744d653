"""Run by test_selection_ranks.py, alone or on two ranks: train a selection, write down what came out.

python selection_ranks.py FOLDER BACKEND; the launcher says how many ranks, and whether DeepSpeed shards.
"""

import json
import sys
from pathlib import Path

import support
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_selection_trainer import plan_for, sft

from posttrain.selection.hft import HFT


def main(folder, backend):
    torch.set_num_threads(1)
    ranks = PartialState(cpu=True).num_processes
    model = support.model(tied=True)
    selection = HFT(seed=3) if backend == "freeze" else plan_for(model, whole=["model.norm.weight"])
    trainer = sft(
        Path(folder) / "run",
        selection,
        backend="auto" if backend == "freeze" else backend,
        decay="selected",
        per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        optim="adamw_torch",
    )
    plan = trainer.selection.plan
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    trainer.end_selection()
    weights = support.whole(trainer.model)
    if trainer.accelerator.is_main_process:
        saved = load_file(f"{folder}/saved/model.safetensors")
        # DeepSpeed's copies of tied weights are two tensors in a file
        head = saved.pop("lm_head.weight", None)
        assert head is None or torch.equal(head, saved["model.embed_tokens.weight"])
        assert all(torch.equal(tensor.float(), weights[name]) for name, tensor in saved.items())
    start = dict(model.named_parameters())
    strays = sum(
        int(((weights[name] != start[name].float()) & ~part.mask()).sum())
        for name, part in plan.tensors.items()
    )
    moved = sum(int((weights[name] != start[name].float()).sum()) for name in plan.tensors)
    out = {
        "sharded": trainer.accelerator.distributed_type == DistributedType.DEEPSPEED,
        "ranks": ranks,
        "plan": plan.fingerprint(),
        "selected": plan.count,
        "strays": strays,
        "moved": moved,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "weights": {name: tensor.flatten().tolist() for name, tensor in weights.items()},
    }
    Path(folder, f"rank{trainer.args.process_index}of{ranks}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
    support.leave()
