"""What needs no ranks: the parts of split tensors, and what is refused."""

import os

import pytest
import support
import torch

from posttrain import SFTTrainer
from posttrain.fully_sharded import skeleton
from posttrain.sharding import ShardingError, gathered, is_split, rows_here, same_everywhere, summed


def test_a_tensor_that_is_not_split_is_all_here():
    tensor = torch.arange(6.0).view(3, 2)
    assert not is_split(tensor)
    assert rows_here(tensor) == (tensor, 0)
    assert torch.equal(gathered(tensor), tensor)
    assert summed(torch.tensor(3), tensor) == 3


def test_fsdp_that_does_not_run_is_refused(tmp_path, monkeypatch):
    """accelerate takes such a configuration for DDP, or for one process, without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ShardingError, match="FSDP is asked for, and accelerate runs NO instead"):
        SFTTrainer(
            model=support.model(),
            args=support.sft_config(tmp_path),
            train_dataset=support.answers(),
            processing_class=support.tokenizer(),
        )
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_a_skeleton_has_the_names_and_no_weights():
    model = support.model(tied=True)
    bones = skeleton(model)
    assert [name for name, _ in bones.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert bones.lm_head.weight is bones.model.embed_tokens.weight
    assert not any(buffer.is_meta for buffer in bones.buffers())
    before = support.weights(model)
    same_everywhere(model)  # nothing shards
    support.assert_same(support.weights(model), before)
