"""configs/rlvr/quickstart.yaml in Python: warm start, evaluation, GRPO with ACE, evaluation, export.

    python recipes/rlvr.py --out runs/recipe

Same numbers as ``posttrain train configs/rlvr/quickstart.yaml`` for the same steps. Left out, because the
verb does it around the training: the run directory with its logs, checkpoints and --resume, the manifest, the
model card, the report.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from trl import GRPOConfig, SFTConfig

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.config.schema import DataConfig, EvaluateConfig, ModelConfig, RewardConfig
from posttrain.data import load_data, load_warm_start, render
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.results import compare
from posttrain.evaluation.table import print_table
from posttrain.export.export import export_model
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards
from posttrain.rl import ACE

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder of the result")
parser.add_argument("--model", default="embedded:char-llama", help="Hub id or folder")
parser.add_argument("--steps", type=int, default=130, help="steps of reinforcement learning")
parser.add_argument("--warm-start-steps", type=int, default=400)
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}

# Data: generated sums, of which 200 are held out
config = DataConfig(
    source="reasoning_gym:chain_sum",
    params={"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    prompt_pattern=": (.*)",
    train={"size": 8000, "seed": 0},
    eval={"size": 200, "seed": 1_000_003},
)
data = load_data(config, "rlvr")
model, tokenizer = load_model(ModelConfig(path=options.model), seed=42)
train, held_out = (render(rows, tokenizer, config) for rows in (data.train, data.eval))

# Warm start: the embedded model has random weights, and reinforcement learning needs some right answers
if options.model.startswith("embedded:"):
    warm_start = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out / "warm_start"),
            max_steps=options.warm_start_steps,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            **machine,
        ),
        train_dataset=render(load_warm_start(data, 20_000), tokenizer, config),
        processing_class=tokenizer,
    )
    warm_start.train()
    warm_start.save_model(str(options.out / "warm_start"))
    tokenizer.save_pretrained(options.out / "warm_start")
    model, _ = load_model(ModelConfig(path=str(options.out / "warm_start")))

# The verifier is both the reward and the judge of the evaluation
(reward,) = build_rewards([RewardConfig(name="verifier")], data)
settings = EvaluateConfig(k=[1, 2, 4, 8, 16], samples=16)
before = evaluate(model, tokenizer, held_out, reward.verify, settings, max_new_tokens=8)

trainer = GRPOTrainer(
    model=model,
    args=GRPOConfig(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        learning_rate=3e-4,
        warmup_steps=10,
        per_device_train_batch_size=512,
        num_generations=8,
        max_completion_length=8,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        **machine,
    ),
    reward_funcs=[reward],
    train_dataset=train,
    processing_class=tokenizer,
    methods=[ACE(alpha=1.0)],
)
trainer.train()
trained = trainer.plain_model()  # whole, also where DeepSpeed or FSDP2 sharded it

after = evaluate(trained, tokenizer, held_out, reward.verify, settings, max_new_tokens=8)
reward.close()
if trainer.accelerator.is_main_process:  # accelerate launch starts several
    print_table({"before": before, "after": after}, Console())
    change = compare(before, after).metrics["pass@1"]
    print(f"pass@1 changed by {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")

    export = export_model(trained, tokenizer, options.out / "export", probe_texts=train[:4]["prompt"])
    limit = export.comparison.max_difference
    print(f"exported to {export.folder}; reloaded logits differ by at most {limit:.2g}")
trainer.accelerator.end_training()
