"""Run by test_preference_sparse_po.py under torchrun: two ranks against one process."""

import json
import sys
from pathlib import Path

import pairs
import support
import torch
from accelerate.utils import gather_object
from peft import LoraConfig

from posttrain.preference.sparse_po import SparsePO

SETTINGS = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "gradient_accumulation_steps": 2}


def weights(run):
    model = run.accelerator.unwrap_model(run.model)
    return support.weights(model) | support.weights(run.modules_of_methods["sparse_po"])


def build(folder, adapter):
    torch.manual_seed(0)  # of the adapter
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None
    return pairs.trainer(
        folder,
        methods=[SparsePO(mask_init="ones", mask_l1_reward=0.01)],
        data=pairs.rows(24),
        peft_config=peft_config,
        per_device_train_batch_size=2,
        **SETTINGS,
    )


def one(folder, adapter):
    run = build(folder, adapter)
    batches = []
    original = run.compute_loss
    run.compute_loss = lambda model, inputs, **kwargs: (
        batches.append({k: v.clone() for k, v in inputs.items()}) or original(model, inputs, **kwargs)
    )
    before = weights(run)
    run.train()
    after = weights(run)
    flat = torch.cat([value.flatten() for value in after.values()])
    both = gather_object([flat.tolist()])
    parts = gather_object([batches])

    # by hand: the mean of the gradients of all micro-batches of a step
    torch.manual_seed(0)
    alone = build(folder / "alone", adapter)
    parameters = [*alone.model.parameters(), *alone.modules_of_methods["sparse_po"].parameters()]
    alone.model.train()
    for step in range(SETTINGS["max_steps"]):
        micro = [batch for rank in parts for batch in rank[2 * step : 2 * step + 2]]
        loss = sum(alone.compute_loss(alone.model, batch) for batch in micro) / len(micro)
        trained = [p for p in parameters if p.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        norm = torch.stack([g.norm() for g in grads[:-5]]).norm()
        scale = min(1.0, float(alone.args.max_grad_norm / (norm + 1e-6)))
        with torch.no_grad():
            for place, (p, g) in enumerate(zip(trained, grads, strict=True)):
                clipped = g * scale if place < len(trained) - 5 else g
                decay = 0.01 if place >= len(trained) - 5 and p.dim() > 0 and _matrix(alone, p) else 0.0
                p -= 0.1 * (clipped + decay * p)
    wanted = weights(alone)
    return {
        "difference": max((after[n] - wanted[n]).abs().max().item() for n in wanted),
        "moved": max((after[n] - before[n]).abs().max().item() for n in wanted if n.startswith("both.")),
        "ranks_equal": both[0] == both[1],
    }


def _matrix(run, parameter):
    net = run.modules_of_methods["sparse_po"]["both"]
    return parameter is net.weight or parameter is net.mix


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    results = {name: one(out / name, name == "lora") for name in ("full", "lora")}
    if torch.distributed.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(results))
    support.leave()
