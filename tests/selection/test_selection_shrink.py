"""Selections that shrink in mid-run: what stays keeps its state, what leaves stays as it is, exact resume."""

import dataclasses
from typing import ClassVar

import pytest
import support
import torch

from posttrain import Select, SFTTrainer
from posttrain.checkpointing.resume import CheckpointError
from posttrain.selection.apply import apply
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.selector import ElementSelector, Schedule

GONE, WHOLE = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


class Halving(ElementSelector):
    """A tenth of every tensor and all of one; from the middle every second of them, and none of another."""

    name: ClassVar[str] = "halving"
    title: ClassVar[str] = "Half of it"
    schedule: ClassVar[Schedule] = "shrink"
    reselect_at: float = 0.5
    offset: int = 0

    def select(self, model, *, round=0, batches=None):
        chosen = {
            name: torch.arange(self.offset, p.numel(), 1 if name == WHOLE else 10)
            for name, p in self.candidates(model).items()
        }
        return self.elements(model, chosen, round=round)

    def reselect(self, model, plan):
        assert all(torch.equal(p.weight, p.whole()) for p in self.packed_of(model))  # written
        tensors = {
            name: TensorSelection.none(part.shape)
            if name == GONE
            else TensorSelection.elements(part.shape, part.flat()[::2])
            for name, part in plan.tensors.items()
        }
        return dataclasses.replace(plan, tensors=tensors, hashes={})

    @staticmethod
    def packed_of(model):
        from posttrain.selection.packed import packed_tensors

        return packed_tensors(model)


def sft(folder, backend="auto", selector=None, dtype=torch.float32, **options):
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "max_grad_norm": 1e9,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return SFTTrainer(
        model=support.model(tied=True, dtype=dtype),
        args=support.sft_config(folder, **(settings | options)),
        train_dataset=support.answers(24),
        processing_class=support.tokenizer(),
        selection=Select(selector or Halving(), backend=backend),
    )


def plain(trainer):
    trainer.selection.refresh()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "selected" not in n}


def middle_and_end(trainer):
    """Weights when the selection shrinks, and at the end."""
    inner, seen = trainer.selection.shrink, []

    def shrink(*args):
        seen.append((trainer.state.global_step, plain(trainer)))
        inner(*args)

    trainer.selection.shrink = shrink
    trainer.train()
    ((step, middle),) = seen
    assert step == 3
    return middle, plain(trainer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_leaves_stops_and_what_stays_keeps_its_state(tmp_path, dtype):
    ends = {}
    for backend in ("packed", "masked"):
        trainer = sft(tmp_path / backend, backend, dtype=dtype, save_strategy="no")
        first = trainer.selection.plan
        middle, ends[backend] = middle_and_end(trainer)
        last = trainer.selection.plan
        assert last.count < 0.55 * first.count
        assert last.tensors[GONE].kind == "none"
        assert first.tensors[WHOLE].kind == "all"
        assert last.tensors[WHOLE].count == first.tensors[WHOLE].count / 2
        assert last.hashes == {n: h for n, h in first.hashes.items() if n != GONE}
        for name, end in ends[backend].items():
            moved = end != middle[name]
            assert not (moved & ~last.tensors[name].mask()).any(), name
            if dtype == torch.float32:
                assert torch.equal(moved, last.tensors[name].mask()), name
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == last.count
    if dtype == torch.float32:  # micro-steps add up in the type of the parameters
        support.assert_same(ends["packed"], ends["masked"])


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_resume_before_at_and_after_is_exact(tmp_path, backend):
    whole = sft(tmp_path / "whole", backend)
    whole.train()
    for step in (3, 4):
        again = sft(tmp_path / f"again{step}", backend)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        support.assert_same(plain(whole), plain(again))
        assert again.selection.plan == whole.selection.plan
    other = sft(tmp_path / "other", backend, Halving(offset=1))
    with pytest.raises(CheckpointError, match="another selection"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    if backend == "packed":  # values of a checkpoint from before, as for the best model at the end
        whole._load_from_checkpoint(str(tmp_path / "whole" / "checkpoint-2"))
        early = sft(tmp_path / "early", backend)
        early._load_from_checkpoint(str(tmp_path / "whole" / "checkpoint-2"))
        support.assert_same(plain(whole), plain(early))


def test_what_cannot_shrink_is_refused(tmp_path):
    trainer = sft(tmp_path)
    trainer._shrinking = Halving()
    for options in ({"deepspeed": True, "sharded": False}, {"deepspeed": False, "sharded": True}):
        with pytest.raises(PlanError, match="fixed what trains"):
            trainer._shrinking_backend("auto", **options)
    for options, reason in (
        ({"optim": "sgd"}, "optim=sgd"),
        ({"backend": "composed"}, "packed or masked"),
    ):
        with pytest.raises(PlanError, match=reason):
            sft(tmp_path, **options)
    model = support.model()
    some = SelectionPlan.for_model(
        model,
        {GONE: TensorSelection.elements((64, 32), torch.tensor([1, 5])), WHOLE: TensorSelection.all((32,))},
    )
    selection = apply(model, some)
    other = TensorSelection.elements((64, 32), torch.tensor([1, 6]))
    with pytest.raises(PlanError, match="no part of the one before"):
        selection.shrink(dataclasses.replace(some, tensors=some.tensors | {GONE: other}))
    less = TensorSelection.elements((32,), torch.tensor([1]))
    with pytest.raises(PlanError, match="moves whole"):
        selection.shrink(dataclasses.replace(some, tensors=some.tensors | {WHOLE: less}))
