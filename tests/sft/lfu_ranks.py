"""Run by test_sft_lfu.py under torchrun: one optimiser step of LfU on two ranks against the formula."""

import json
import sys
from pathlib import Path

import support
import torch
from accelerate.utils import gather_object
from test_sft_lfu import Gradients, reference, trainer

from posttrain.sft.lfu import LfU


def one(folder, accumulation):
    gradients = Gradients()
    method = LfU(alpha=0.5)
    run = trainer(
        folder, [method], callbacks=[gradients], max_steps=1, gradient_accumulation_steps=accumulation
    )
    seen, original, draw = ([], []), run._micro_step, run._another

    def step(model, inputs):
        seen[0].append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return original(model, inputs)

    def another():
        seen[1].append(draw())
        return dict(seen[1][-1])

    run._micro_step, run._another = step, another
    before = support.weights(run.model)
    run.train()
    after = torch.cat([value.flatten() for value in support.weights(run.model).values()])
    both = gather_object([after.tolist()])
    model = run.model
    model.load_state_dict(before)
    (found,) = gradients.found
    found = {name.removeprefix("module."): value for name, value in found.items()}

    def gradient(batches, others, weight):
        return reference(model, batches, others, method.alpha, weight, list(found))[0]

    # the tokens of all ranks divide the SFT loss; the penalty is a mean over micro-batches and ranks
    every = gather_object([seen])
    batches = [batch for rank in every for batch in rank[0]]
    others = [batch for rank in every for batch in rank[1]]
    wanted, plain = gradient(batches, others, method.weight), gradient(batches, others, 0.0)
    return {
        "difference": max((found[n].double() - wanted[n]).abs().max().item() for n in wanted),
        "effect": max((plain[n] - wanted[n]).abs().max().item() for n in wanted),
        "ranks_equal": both[0] == both[1],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    results = [one(out / str(accumulation), accumulation) for accumulation in (1, 2)]
    if torch.distributed.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(results))
    support.leave()
