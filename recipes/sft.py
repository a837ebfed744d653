"""configs/sft/chain_sum_cpu.yaml in Python: supervised fine-tuning, evaluation, export.

    python recipes/sft.py --out runs/recipe_sft

Same numbers as ``posttrain train configs/sft/chain_sum_cpu.yaml`` for the same steps. Left out, because the
verb does it around the training: the run directory with its logs, checkpoints and --resume, the manifest, the
model card, the report.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from trl import SFTConfig

from posttrain import SFTTrainer
from posttrain.config.schema import DataConfig, EvaluateConfig, ModelConfig, RewardConfig
from posttrain.data import load_data, render
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.table import print_table
from posttrain.export.export import export_model
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/recipe_sft"), help="folder of the result")
parser.add_argument("--model", default="embedded:char-llama", help="Hub id or folder")
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}

config = DataConfig(
    source="reasoning_gym:chain_sum",
    params={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    prompt_pattern=": (.*)",
    train={"size": 5000, "seed": 0},
    eval={"size": 20, "seed": 1_000_003},
)
data = load_data(config, "sft")  # the answer of a problem becomes its completion
model, tokenizer = load_model(ModelConfig(path=options.model), seed=42)
train, held_out = (render(rows, tokenizer, config) for rows in (data.train, data.eval))

(judge,) = build_rewards([RewardConfig(name="verifier")], data)
settings = EvaluateConfig(k=[1, 4], samples=4)
before = evaluate(model, tokenizer, held_out, judge.verify, settings, max_new_tokens=8)

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        **machine,
    ),
    train_dataset=train,
    processing_class=tokenizer,
)
trainer.train()
trained = trainer.plain_model()  # whole, also where DeepSpeed or FSDP2 sharded it

after = evaluate(trained, tokenizer, held_out, judge.verify, settings, max_new_tokens=8)
judge.close()
if trainer.accelerator.is_main_process:  # accelerate launch starts several
    print_table({"before": before, "after": after}, Console())

    export = export_model(trained, tokenizer, options.out / "export", probe_texts=train[:4]["prompt"])
    limit = export.comparison.max_difference
    print(f"exported to {export.folder}; reloaded logits differ by at most {limit:.2g}")
trainer.accelerator.end_training()
