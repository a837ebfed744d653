"""Run by test_stream_ranks.py on two gloo ranks: streams of weights that FSDP2 has split."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import support
import torch
from peft import LoraConfig, get_peft_model
from test_updates import Engine, merged, plain_weights, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from posttrain.rollout.updates import WeightStream
from posttrain.selection.apply import apply
from posttrain.selection.random_mask import RandomMask
from posttrain.sharding import is_split


def split(model: torch.nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    for layer in plain.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def run(kind: str) -> dict[str, torch.Tensor]:
    """Return what an engine has after three steps, having compared it with a model that is not split."""
    torch.manual_seed(0)
    model, selection = support.model(tied=kind == "tied"), None
    if kind == "packed":
        selection = apply(model, RandomMask(budget=0.05).select(model), "composed", sharded=True)
    elif kind in ("lora", "dora"):
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, use_dora=kind == "dora"))
    whole = copy.deepcopy(model)
    split(model)
    assert all(is_split(parameter) for parameter in model.parameters())
    engine = Engine(WeightStream(model, lambda: selection))
    for seed in range(3):
        step(whole, seed=seed)
        full = dict(whole.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    local = torch.chunk(full[name], 2)[torch.distributed.get_rank() :][:1]
                    part = parameter.to_local()
                    part.copy_(local[0] if local else part)
        engine.sync()
    if kind == "packed":
        wanted = plain_weights(whole)
        for name, packed in selection.packed.items():
            wanted[name] = packed.whole(wanted[name], wanted.pop(f"{name}_selected"))
    else:
        wanted = merged(whole) if kind in ("lora", "dora") else plain_weights(whole)
    assert engine.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(engine.tensors[name], tensor), (kind, name)
    return engine.tensors


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {kind: run(kind) for kind in ("plain", "tied", "lora", "dora", "packed")}
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
