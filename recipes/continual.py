"""Two tasks in a row, the second by half fine-tuning, and what remains of the first.

    python recipes/continual.py --out runs/recipe_continual

Same weights as ``posttrain continual configs/continual/sums.yaml --base configs/continual/words.yaml --arm
hft:selection=hft --seeds 1``. Left out, because the verb does it around the training: further arms and seeds
with intervals, run directories, and going on where it was stopped.
"""

import argparse
from pathlib import Path

import torch
from trl import SFTConfig

from posttrain import Select, SFTTrainer
from posttrain.config.schema import DataConfig, EvaluateConfig, ModelConfig, RewardConfig
from posttrain.data import load_data, render
from posttrain.evaluation.evaluate import evaluate
from posttrain.export.export import export_model
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards
from posttrain.selection.hft import HFT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/recipe_continual"), help="folder of the result")
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}

tasks = {
    "words": DataConfig(
        source="reasoning_gym:spell_backward",
        params={"min_word_len": 3, "max_word_len": 5},
        prompt_pattern=": (.*)",
        train={"size": 20_000, "seed": 0},
        eval={"size": 200},
    ),
    "sums": DataConfig(
        source="reasoning_gym:chain_sum",
        params={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        prompt_pattern=": (.*)",
        train={"size": 1500, "seed": 0},
        eval={"size": 200},
    ),
}
data = {name: load_data(config, "sft") for name, config in tasks.items()}
judges = {name: build_rewards([RewardConfig(name="verifier")], rows)[0] for name, rows in data.items()}
model, tokenizer = load_model(ModelConfig(path="embedded:char-llama"), seed=42)
greedy = EvaluateConfig(k=[1], samples=1, temperature=0)
steps, rates = {"words": 500, "sums": 400}, {"words": 1e-3, "sums": 5e-4}

for number, (task, config) in enumerate(tasks.items()):
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out / "checkpoints" / task),
            max_steps=steps[task],
            per_device_train_batch_size=64,
            learning_rate=rates[task],
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            **machine,
        ),
        train_dataset=render(data[task].train, tokenizer, config),
        processing_class=tokenizer,
        # the first task is learned from random weights, with all of them
        selection=Select(HFT(), round=number - 1) if number else None,
    )
    trainer.train()
    trainer.end_selection()
    model = trainer.model
    for name, other in tasks.items():
        rows = render(data[name].eval, tokenizer, other)
        found = evaluate(model, tokenizer, rows, judges[name].verify, greedy, max_new_tokens=10)
        print(f"after {task}: {found.metrics['pass@1'].value:.3f} right on {name}")
    export_model(model, tokenizer, options.out / task)

for judge in judges.values():
    judge.close()
