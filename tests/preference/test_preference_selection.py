"""DPO and reward models with a selection: TRL's numbers without one, only selected weights move with one."""

import pytest
import support
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, RewardConfig
from trl import DPOTrainer as TRLDPOTrainer
from trl import RewardTrainer as TRLRewardTrainer

from posttrain import DPOTrainer, RewardTrainer, SelectionPlan
from posttrain.selection.plan import TensorSelection

PAIRS = {
    "dpo": (DPOTrainer, TRLDPOTrainer, DPOConfig),
    "reward": (RewardTrainer, TRLRewardTrainer, RewardConfig),
}


def start(kind, dtype=torch.float32):
    model = support.model(tied=True, dtype=dtype)
    if kind == "dpo":
        return model
    with torch.random.fork_rng():
        torch.manual_seed(5)
        scorer = LlamaForSequenceClassification(
            model.config.__class__(**model.config.to_dict(), num_labels=1)
        )
    scorer.model.load_state_dict(model.model.state_dict())
    return scorer.to(dtype)


def trainer(kind, folder, *, trl=False, dtype=torch.float32, selection=None, peft_config=None, **settings):
    ours, theirs, config = PAIRS[kind]
    rows = Dataset.from_dict(
        {
            "prompt": [f"say {i}" for i in range(16)],
            "chosen": [f" well {i * i}" for i in range(16)],
            "rejected": [f" no {i}" for i in range(16)],
        }
    )
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": 4,
        "weight_decay": 0.1,
        "optim": "adamw_torch",
    }
    model = start(kind, dtype)
    if kind == "dpo":  # TRL loads the reference from where the model came from
        model.save_pretrained(f"{folder}-start")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}-start", dtype=dtype)
    return (theirs if trl else ours)(
        model=model,
        args=config(**(defaults | settings)),
        train_dataset=rows,
        processing_class=support.tokenizer(),
        **({"peft_config": peft_config} if peft_config else {}),
        **({} if trl else {"selection": selection}),
    )


def plan_for(model, share=0.1):
    draw = torch.Generator().manual_seed(1)
    parts = {n: torch.rand(p.shape, generator=draw) < share for n, p in model.named_parameters()}
    return SelectionPlan.for_model(model, {n: TensorSelection.from_mask(mask) for n, mask in parts.items()})


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_without_a_selection_the_numbers_are_trls(kind, adapter, tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear") if adapter else None
    weights, losses = [], []
    for trl in (True, False):
        torch.manual_seed(0)
        one = trainer(kind, tmp_path / str(trl), trl=trl, peft_config=lora)
        one.train()
        weights.append(dict(one.model.named_parameters()))
        losses.append([row["loss"] for row in one.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("kind", ["dpo", "reward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_scalars_move(kind, dtype, tmp_path):
    plan = plan_for(start(kind, dtype))
    one = trainer(kind, tmp_path, dtype=dtype, selection=plan, gradient_accumulation_steps=2)
    one.train()
    one.end_selection()
    before, count = dict(start(kind, dtype).named_parameters()), 0
    for name, tensor in one.model.named_parameters():
        changed = tensor != before[name]
        assert not (changed & ~plan.tensors[name].mask()).any(), name
        count += int(changed.sum())
    assert 0.5 * plan.count < count <= plan.count


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_resume_is_exact(kind, tmp_path):
    plan = plan_for(start(kind))
    settings = {"save_strategy": "steps", "save_steps": 2}
    straight = trainer(kind, tmp_path / "a", selection=plan, **settings)
    straight.train()
    again = trainer(kind, tmp_path / "b", selection=plan, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    straight.end_selection()
    again.end_selection()
    weights = dict(again.model.named_parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in straight.model.named_parameters())
