"""configs/preference/dpo_stories.yaml in Python: DPO on pairs, and what it did against the starting model.

    python recipes/preference.py --out runs/recipe_preference

Same numbers as ``posttrain train configs/preference/dpo_stories.yaml`` for the same steps. Left out, because
the verb does it around the training: the run directory with its logs, checkpoints and --resume, the manifest,
the model card, the report. The data are those of the project's shared folder beside the
checkout; put your own file with prompt, chosen and rejected in --data.
"""

import argparse
import contextlib
import copy
from pathlib import Path

import torch
from rich.console import Console
from trl import DPOConfig

from posttrain import DPOTrainer
from posttrain.config.schema import DataConfig, EvaluateConfig, ModelConfig, RewardConfig
from posttrain.data import load_data, render
from posttrain.evaluation.preference import evaluate_preferences
from posttrain.evaluation.table import print_table
from posttrain.export.export import export_model
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/recipe_preference"), help="folder of the result")
parser.add_argument("--model", default="../shared/checkpoints/stories260K", help="Hub id or folder")
parser.add_argument("--data", type=Path, default=Path("../shared/data/tinystories_pairs"), help="folder")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}

config = DataConfig(
    source=str(options.data / "train.jsonl"),
    eval={"file": str(options.data / "test.jsonl")},
    # label_noise={"share": 0.2, "seed": 0} exchanges chosen and rejected in a fifth of the training rows
)
data = load_data(config, "preference")
model, tokenizer = load_model(ModelConfig(path=options.model), seed=42)
start = copy.deepcopy(model)  # the reference of the loss, and what the result is compared with
train, held_out = (render(rows, tokenizer, config) for rows in (data.train, data.eval))

# Training sees pairs only; the word score judges new continuations
wanted = (
    "beautiful best friend friends fun good great happy hug hugged kind laugh laughed love loved loves nice "
    "play played proud smile smiled smiles thank yay"
)
unwanted = "afraid angry bad broke broken cried cry dark fell hurt lost mad mean no not sad scared sick sorry"
words = {
    "positive": wanted.split(),
    "negative": unwanted.split(),
    "bound": 10.0,
}
(judge,) = build_rewards([RewardConfig(name="word_list", params=words)], data)
measure = {"beta": 0.1, "max_length": 192, "max_new_tokens": 80, "verify": judge.verify}
settings = EvaluateConfig(k=[1], samples=4)
before = evaluate_preferences(model, tokenizer, held_out, settings, reference=None, **measure)

trainer = DPOTrainer(
    model=model,
    ref_model=start,
    args=DPOConfig(
        output_dir=str(options.out / "checkpoints"),
        beta=0.1,
        learning_rate=3e-4,
        max_steps=options.steps,
        warmup_steps=5,
        per_device_train_batch_size=16,
        max_length=192,
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        **machine,
    ),
    train_dataset=train,
    processing_class=tokenizer,
    methods=[],  # 'posttrain methods' lists them: RPO(), FlexDPO(), SparsePO(), ...
)
trainer.train()
trained = trainer.plain_model()  # whole, also where DeepSpeed or FSDP2 sharded it

after = evaluate_preferences(
    trained,
    tokenizer,
    held_out,
    settings,
    reference=lambda: contextlib.nullcontext(start),
    start=before,
    **measure,
)
judge.close()
if trainer.accelerator.is_main_process:  # accelerate launch starts several
    print_table({"before": before, "after": after}, Console())

    export = export_model(trained, tokenizer, options.out / "export", probe_texts=train[:4]["prompt"])
    limit = export.comparison.max_difference
    print(f"exported to {export.folder}; reloaded logits differ by at most {limit:.2g}")
trainer.accelerator.end_training()
