"""The check after the first syncs: its numbers, its limits, and a trainer whose engine lies."""

import math
from types import SimpleNamespace

import pytest
import support
import torch

from posttrain import GRPOTrainer
from posttrain.rollout.settings import RolloutSettings
from posttrain.rollout.updates import RolloutError
from posttrain.rollout.verify import Gap, default_limit, gap_of, refuse_gap

NAN = float("nan")


def test_gap_by_hand():
    own = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -4.0, -1.0]])
    sampled = torch.tensor([[-1.25, -2.0, 0.0], [-1.5, NAN, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    gap = gap_of(own, sampled, mask)
    assert gap == Gap(total=1.25, tokens=4, worst=1.0, row=1, column=0)
    assert gap.mean == 0.3125
    assert gap_of(own, sampled, mask * 0).tokens == 0


def test_a_nan_of_the_trainer_is_the_worst_of_all():
    gap = gap_of(torch.tensor([[-1.0, NAN]]), torch.tensor([[-9.0, -1.0]]), torch.ones(1, 2))
    assert math.isnan(gap.worst)
    assert (gap.row, gap.column) == (0, 1)
    with pytest.raises(RolloutError, match="differ by nan"):
        refuse_gap(gap.mean, 1.0, sync=1, sent="all", worst="x", dtype=torch.float32)


def test_limits_follow_the_type():
    limits = [default_limit(torch.float32, "cpu"), default_limit(torch.float32, "cuda")]
    limits += [default_limit(torch.bfloat16, "cpu"), default_limit(torch.float16, "cuda")]
    assert limits == [1e-4, 2e-3, 5e-2, 5e-2]
    refuse_gap(1e-4, 1e-4, sync=1, sent="all", worst="x", dtype=torch.float32)


@pytest.mark.parametrize("corrected", [True, False], ids=["TRL scores", "we score"])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_an_engine_that_lies_stops_the_run(tmp_path, corrected, top_p):
    """``error`` is what the sampler's log-probabilities are off by; sampling itself is transformers'."""
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=1, top_p=top_p, temperature=0.8),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout=RolloutSettings(probe_syncs=2),
    )
    seen = {}
    trainer.check_sync = lambda batch: seen.update(batch)
    trainer.train()
    del trainer.check_sync
    trainer.vllm_importance_sampling_correction = corrected
    stream = SimpleNamespace(dtype=torch.float32)
    trainer.weight_sync = SimpleNamespace(count=1, share=1.0, stream=stream)
    with torch.no_grad():
        for name, tensor in support.model().state_dict().items():
            trainer.model.state_dict()[name].copy_(tensor)
    own = trainer._logps_of_batch(trainer.model, seen, 4)
    trainer._measures_kept = trainer._old_pass_is_next = trainer.truncation is not None
    kept = own - trainer._logps_of_batch(trainer.model, seen, 4)
    assert (kept[seen["completion_mask"].bool()] < 0).all() == (top_p < 1)
    batch = {**seen, "old_per_token_logps": own}
    batch["sampling_per_token_logps"] = own if corrected else own - kept

    trainer.check_sync(batch)
    batch["sampling_per_token_logps"] = batch["sampling_per_token_logps"].clone()
    batch["sampling_per_token_logps"][1, 2] -= 0.5
    trainer.check_sync(batch)  # this sync has been looked at
    trainer.weight_sync.count = 2
    with pytest.raises(
        RolloutError, match=r"after sync 2 \(100% of the weights\).*0.5 nats at token 2 \("
    ) as e:
        trainer.check_sync(batch)
    assert "of row 1 on rank 0" in str(e.value)
    trainer.weight_sync.count = 3
    trainer.check_sync(batch)  # beyond probe_syncs
