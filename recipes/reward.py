"""configs/reward/stories.yaml in Python: a reward model from pairs, and its scores of new texts.

    python recipes/reward.py --out runs/recipe_reward

Same numbers as ``posttrain train configs/reward/stories.yaml`` for the same steps. Left out, because the
verb does it around the training: the run directory with its logs, checkpoints and --resume, the manifest,
the model card, the report. The data are those of the project's shared folder beside the
checkout; put your own file with prompt, chosen and rejected in --data.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from trl import RewardConfig

from posttrain import RewardTrainer
from posttrain.config.schema import DataConfig, EvaluateConfig, ModelConfig
from posttrain.data import load_data, render
from posttrain.evaluation.scoring import evaluate_scorer
from posttrain.evaluation.table import print_table
from posttrain.export.export import export_model
from posttrain.models.scoring import load_reward_model
from posttrain.rewards.model import ModelReward

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/recipe_reward"), help="folder of the result")
parser.add_argument("--model", default="../shared/checkpoints/stories260K", help="Hub id or folder")
parser.add_argument("--data", type=Path, default=Path("../shared/data/tinystories_pairs"), help="folder")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}

config = DataConfig(source=str(options.data / "train.jsonl"), eval={"file": str(options.data / "test.jsonl")})
data = load_data(config, "reward")
model, tokenizer = load_reward_model(ModelConfig(path=options.model), seed=42)  # with a fresh head
train, held_out = (render(rows, tokenizer, config) for rows in (data.train, data.eval))
settings = EvaluateConfig(k=[1])
before = evaluate_scorer(model, tokenizer, held_out, settings)

trainer = RewardTrainer(
    model=model,
    args=RewardConfig(
        output_dir=str(options.out / "checkpoints"),
        learning_rate=1e-3,
        max_steps=options.steps,
        warmup_steps=10,
        per_device_train_batch_size=16,
        max_length=192,
        center_rewards_coefficient=0.01,
        gradient_checkpointing=False,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        **machine,
    ),
    train_dataset=train,
    processing_class=tokenizer,
)
trainer.train()
trained = trainer.plain_model()  # whole, also where DeepSpeed or FSDP2 sharded it
after = evaluate_scorer(trained, tokenizer, held_out, settings)
if trainer.accelerator.is_main_process:  # accelerate launch starts several
    print_table({"before": before, "after": after}, Console())

    export = export_model(trained, tokenizer, options.out / "export", probe_texts=train[:4]["prompt"])
    limit = export.comparison.max_difference
    print(f"exported to {export.folder}; reloaded logits differ by at most {limit:.2g}")

    # As rewards: ["model:runs/recipe_reward/export"] in a configuration, or as a function for any trainer
    reward = ModelReward(options.out / "export")
    texts = [" They played and hugged.", " He was sad and cried."]
    print(reward(prompts=["Tom saw a big frog in the park."] * 2, completions=texts))
trainer.accelerator.end_training()
