"""``selection=`` on trainers: what trains, what does not, optimiser state, checkpoints, clipping."""

import pytest
import support
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, SFTConfig

from posttrain import GRPOTrainer, Select, SFTTrainer
from posttrain.checkpointing.resume import CheckpointError
from posttrain.selection.adamw import SelectiveAdamW
from posttrain.selection.apply import apply
from posttrain.selection.id3 import ID3
from posttrain.selection.magnitude import Magnitude
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection

STEPS = 4


def plan_for(model, share=0.05, seed=0, whole=()):
    draw = torch.Generator().manual_seed(seed)
    return SelectionPlan.for_model(
        model,
        {
            name: TensorSelection.all(p.shape)
            if name in whole
            else TensorSelection.from_mask(torch.rand(p.shape, generator=draw) < share)
            for name, p in model.named_parameters()
        },
        method="random",
    )


def sft(
    folder, selection=None, *, backend="auto", dtype=torch.float32, decay="off", held_out=False, **settings
):
    rows = Dataset.from_dict({"text": [f"say {i} and {i * i}" for i in range(32)]})
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": STEPS,
        "weight_decay": 0.1,
    }
    args = SFTConfig(**(defaults | settings))
    trainer = SFTTrainer(
        model=support.model(tied=True, dtype=dtype),
        args=args,
        train_dataset=rows,
        eval_dataset=rows if held_out else None,
        processing_class=support.tokenizer(),
    )
    if selection is not None:
        selection = Select(selection, backend=backend, weight_decay=decay)
    trainer.start_selection(selection)
    return trainer


def moved(trainer, plan, dtype=torch.float32):
    """Assert that only selected scalars moved; return how many did."""
    start = dict(support.model(tied=True, dtype=dtype).named_parameters())
    trainer.selection.remove()
    count = 0
    for name, tensor in trainer.model.named_parameters():
        changed = tensor != start[name]
        assert not (changed & ~plan.tensors[name].mask()).any(), name
        count += int(changed.sum())
    return count


@pytest.mark.parametrize("backend", ["packed", "composed", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unselected_weights_stay_to_the_bit_and_state_follows_the_budget(tmp_path, backend, dtype):
    """AdamW with decay, budget exact, state for the selected only: what the public toolkit does not give."""
    model = support.model(tied=True, dtype=dtype)
    plan = plan_for(model, whole=["model.norm.weight"])
    trainer = sft(tmp_path, plan, backend=backend, dtype=dtype, gradient_accumulation_steps=2)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    first_moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert first_moments == plan.count
    assert isinstance(optimizer, SelectiveAdamW) == (backend == "masked" or dtype != torch.float32)
    count = moved(trainer, plan, dtype)
    assert count <= plan.count
    assert count > (0.9 if dtype == torch.float32 else 0.5) * plan.count


def test_backends_agree(tmp_path):
    plan = plan_for(support.model(tied=True))
    weights = {}
    for backend in ("packed", "composed", "masked"):
        # the fused kernel rounds differently, and so do the norms of two layouts: no clipping
        options = {"optim": "adamw_torch", "max_grad_norm": 1e9, "weight_decay": 0.0}
        trainer = sft(tmp_path / backend, plan, backend=backend, **options)
        trainer.train()
        trainer.selection.remove()
        weights[backend] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for name, tensor in weights["packed"].items():
        assert torch.equal(tensor, weights["masked"][name]), name
        assert torch.allclose(tensor, weights["composed"][name], atol=1e-6), name


def test_whole_tensors_are_frozen(tmp_path):
    model = support.model(tied=True)
    names = [name for name, _ in model.named_parameters()]
    plan = SelectionPlan.for_model(
        model, {name: TensorSelection.all(dict(model.named_parameters())[name].shape) for name in names[1::2]}
    )
    trainer = sft(tmp_path, plan)
    assert trainer.selection.backend == "freeze"
    trainer.train()
    assert len(trainer.optimizer.state) == len(names[1::2])
    assert all(p.grad is None for name, p in trainer.model.named_parameters() if name in names[0::2])
    assert moved(trainer, plan) > 0


@pytest.mark.parametrize("backend", ["packed", "composed", "masked"])
def test_resume_is_exact_and_the_model_saved_is_plain(tmp_path, backend):
    plan = plan_for(support.model(tied=True))
    settings = {"backend": backend, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = sft(tmp_path / "whole", plan, **settings)
    whole.train()
    again = sft(tmp_path / "again", plan, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    left, right = (one.selection.plain(one.model.state_dict()) for one in (whole, again))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    again.save_model(str(tmp_path / "model"))
    again.selection.remove()
    for folder in (tmp_path / "model", tmp_path / "again" / "checkpoint-6"):
        plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, tensor in plain.named_parameters():
            assert torch.equal(tensor, dict(again.model.named_parameters())[name]), name
    other = sft(tmp_path / "other", plan_for(support.model(tied=True), seed=1), **settings)
    with pytest.raises(CheckpointError, match="another selection"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_the_best_checkpoint_is_what_remains(tmp_path, backend):
    plan = plan_for(support.model(tied=True))
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    # the highest loss, so that it is not the last checkpoint
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = sft(tmp_path, plan, backend=backend, max_steps=6, held_out=True, **every, **best)
    trainer.train()
    kept = trainer.state.best_model_checkpoint
    assert not kept.endswith("-6")
    trainer.end_selection()
    for name, tensor in AutoModelForCausalLM.from_pretrained(kept).named_parameters():
        assert torch.equal(tensor, dict(trainer.model.named_parameters())[name]), name


def test_clipping_sees_the_masked_norm(tmp_path):
    plan = plan_for(support.model(tied=True))
    norms = {}
    for backend in ("packed", "masked"):
        trainer = sft(tmp_path / backend, plan, backend=backend, max_grad_norm=1e-3, max_steps=1)
        trainer.train()
        norms[backend] = trainer.state.log_history[0]["grad_norm"]
    dense = sft(tmp_path / "dense", max_grad_norm=1e-3, max_steps=1)
    dense.train()
    assert norms["packed"] == pytest.approx(norms["masked"], rel=1e-5)
    assert norms["packed"] < 0.6 * dense.state.log_history[0]["grad_norm"]


@pytest.mark.parametrize(("decay", "expected"), [("off", 1.0), ("selected", 0.9), ("to_base", 1.0)])
def test_weight_decay_modes_with_no_gradient(tmp_path, decay, expected):
    """lr 1, wd 0.1, gradient 0: values stay, shrink by 1 - lr wd, or stay at the base they started from."""
    plan = plan_for(support.model(tied=True))
    trainer = sft(tmp_path, plan, decay=decay, learning_rate=1.0, max_steps=1)
    before = {name: packed.values.detach().clone() for name, packed in trainer.selection.packed.items()}
    trainer.compute_loss = lambda model, inputs, *a, **k: sum(
        (p.values * 0).sum() for p in trainer.selection.packed.values()
    )
    trainer.train()
    for name, packed in trainer.selection.packed.items():
        if "norm" in name:
            continue  # norms never decay
        assert torch.allclose(packed.values, before[name] * expected, rtol=1e-6), name


@pytest.mark.parametrize(("decay", "scalars"), [("off", 1.0), ("selected", 0.9)])
@pytest.mark.parametrize("backend", ["packed", "masked"])
def test_whole_tensors_decay_as_without_a_selection(tmp_path, backend, decay, scalars):
    """lr 1, wd 0.1, gradient 0: the same for both backends, as for frozen tensors."""
    start = dict(support.model(tied=True).named_parameters())
    whole = "model.layers.0.mlp.up_proj.weight"
    plan = plan_for(support.model(tied=True), whole=[whole])
    trainer = sft(tmp_path, plan, backend=backend, decay=decay, learning_rate=1.0, max_steps=1)
    trainer.compute_loss = lambda model, *a, **k: sum(
        (p * 0).sum() for p in model.parameters() if p.requires_grad
    )
    trainer.train()
    trainer.selection.remove()
    for name, tensor in trainer.model.named_parameters():
        factor = 0.9 if name == whole else 1.0 if "norm" in name else scalars
        expected = torch.where(plan.tensors[name].mask(), start[name] * factor, start[name])
        assert torch.allclose(tensor, expected, rtol=1e-6), name


def test_half_precision_logs_what_is_visible(tmp_path):
    plan = plan_for(support.model(tied=True, dtype=torch.bfloat16))
    trainer = sft(tmp_path, plan, dtype=torch.bfloat16, learning_rate=1e-6)
    trainer.train()
    shares = [row["selection/changed"] for row in trainer.state.log_history if "loss" in row]
    assert all(0 <= share < 0.9 for share in shares)


def halves(model):
    return SelectionPlan.for_model(
        model,
        {
            name: (TensorSelection.all if "mlp" in name else TensorSelection.none)(p.shape)
            for name, p in model.named_parameters()
        },
        method="explicit",
    )


@pytest.mark.parametrize("keep", [True, False])
def test_whole_tensors_in_half_precision_train_on_a_copy_in_fp32(tmp_path, keep, caplog):
    """A gradient of 1 makes Adam's step the learning rate: lost in bf16 but for the smallest weights."""
    rate, steps = 2e-5, 16
    plan = halves(support.model(tied=True, dtype=torch.bfloat16))
    chosen = Select(plan, master_weights=keep)
    trainer = sft(tmp_path, dtype=torch.bfloat16, learning_rate=rate, max_steps=steps, weight_decay=0.0)
    trainer.start_selection(chosen)
    trainer.compute_loss = lambda model, *a, **k: sum(
        p.float().sum() for p in model.parameters() if p.requires_grad
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.selection.backend == "freeze"
    lost = total = 0
    for name, tensor in trainer.model.named_parameters():
        if "mlp" not in name:
            assert torch.equal(tensor, start[name])
            continue
        lost += int((tensor == start[name]).sum())
        total += tensor.numel()
        if keep:
            exact = start[name].float() - rate * steps
            # rounded once, at the end: half of the last place of bf16 is at most 2^-8 of a value
            assert ((tensor.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-8).all(), name
    assert lost < 0.1 * total if keep else lost > 0.5 * total
    shares = [row.get("selection/changed_by_step") for row in trainer.state.log_history if "loss" in row]
    if keep:
        assert all(0 < share < 0.9 for share in shares)
    else:
        assert set(shares) == {None}
        assert "train in half precision without a copy in fp32 (master_weights is off)" in caplog.text


@pytest.mark.parametrize(("rate", "told"), [(1e-5, True), (1e-3, False)])
def test_without_a_selection_lost_steps_are_told(tmp_path, rate, told, caplog):
    trainer = sft(tmp_path, dtype=torch.bfloat16, learning_rate=rate, max_steps=1)
    trainer.train()
    assert ("without a copy in fp32 (as in TRL)" in caplog.text) == told
    assert not isinstance(trainer.optimizer.optimizer, SelectiveAdamW)


def test_resume_with_copies_in_fp32_is_exact(tmp_path):
    model = support.model(tied=True, dtype=torch.bfloat16)
    plan = plan_for(model, whole=["model.layers.0.mlp.up_proj.weight"])
    settings = {"dtype": torch.bfloat16, "learning_rate": 1e-5, "save_strategy": "steps", "save_steps": 2}
    for what, folder in ((plan, "packed"), (halves(model), "freeze")):
        whole = sft(tmp_path / folder, what, **settings)
        whole.train()
        again = sft(tmp_path / folder, what, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-2"))
        assert again.selection.backend == folder
        for (name, ours), theirs in zip(
            whole.model.named_parameters(), again.model.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        for ours, theirs in zip(
            whole.optimizer.optimizer.state.values(),
            again.optimizer.optimizer.state.values(),
            strict=True,
        ):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            assert ours["exp_avg"].dtype == torch.float32


def test_reinforcement_learning_with_a_selection(tmp_path):
    model = support.model(tied=True)
    plan = plan_for(model)
    trainer = GRPOTrainer(
        model=model,
        args=support.grpo_config(tmp_path, max_steps=3, learning_rate=1e-2, beta=0.0),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        selection=plan,
    )
    assert isinstance(trainer.args, GRPOConfig)
    trainer.train()
    assert moved(trainer, plan) > 0


def test_lora_scalars_can_be_selected_and_the_base_cannot(tmp_path):
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, max_steps=3, learning_rate=1e-2),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=support.lora(),
    )
    model = trainer.model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    some = {
        name: TensorSelection.from_mask(torch.rand(start[name].shape, generator=draw) < 0.5) for name in names
    }
    plan = SelectionPlan.for_model(model, some)
    trainer.start_selection(plan)
    trainer.train()
    trainer.selection.remove()
    changed = 0
    for name, p in model.named_parameters():
        different = p != start[name]
        assert not (different & ~plan.tensors[name].mask()).any(), name
        changed += int(different.sum())
    assert 0 < changed <= plan.count
    base = next(name for name in start if name not in names and start[name].dim() == 2)
    wrong = SelectionPlan.for_model(model, {base: TensorSelection.all(start[base].shape)})
    with pytest.raises(PlanError, match="frozen"):
        trainer.start_selection(wrong)


def test_what_cannot_be_enforced_is_refused_with_the_reason(tmp_path):
    model = support.model()
    plan = plan_for(model)
    for options, reason in [
        ({"backend": "freeze"}, "parts of tensors"),
        ({"backend": "packed", "sharded": True}, "use composed"),
        ({"backend": "masked", "deepspeed": True}, "its own optimiser"),
        ({"backend": "packed", "candidates": ["lm_head.weight"]}, "changes while it trains"),
        ({"candidates": ["lm_head.weight"], "deepspeed": True}, "between backward and step"),
        ({"candidates": ["lm_head.weight"], "sharded": True}, "use DDP"),
        ({"backend": "packd"}, "unknown backend"),
    ]:
        with pytest.raises(PlanError, match=reason):
            apply(model, plan, **options)
    assert all(p.requires_grad for p in model.parameters())
    for backend, share in (("masked", 0.05), ("auto", 2.0)):  # of 2.0 whole tensors train
        with pytest.raises(PlanError, match="to_base needs packed values"):
            sft(tmp_path, plan_for(support.model(tied=True), share), backend=backend, decay="to_base")
    with pytest.raises(PlanError, match="optim=sgd"):
        sft(tmp_path, plan_for(support.model(tied=True)), backend="masked", optim="sgd")


def test_a_selector_that_cannot_select_is_a_plan_error(tmp_path):
    """What a run reports as a mistake in its selection, not as a failure."""
    for selector in (Magnitude(budget=10**8), ID3(budget=10**8), Magnitude(budget=1e-9)):
        with pytest.raises(PlanError, match="candidate scalars"):
            sft(tmp_path, selector)
    broken = support.model(tied=True)
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    with pytest.raises(PlanError, match=r"norm\.weight at flat position 3 is nan"):
        SFTTrainer(
            model=broken,
            args=support.sft_config(tmp_path),
            train_dataset=support.answers(),
            processing_class=support.tokenizer(),
            selection=Magnitude(budget=5),
        )


def test_single_scalars_under_fsdp1_are_refused(tmp_path, monkeypatch):
    plan = plan_for(support.model(tied=True))
    trainer = sft(tmp_path)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
    with pytest.raises(PlanError, match="cannot be trained under FSDP1"):
        trainer.start_selection(plan)
    names = [name for name, _ in trainer.model.named_parameters()]
    whole = {names[0]: TensorSelection.all(plan.tensors[names[0]].shape)}
    trainer.start_selection(SelectionPlan.for_model(trainer.model, whole))
    assert trainer.selection.backend == "freeze"
