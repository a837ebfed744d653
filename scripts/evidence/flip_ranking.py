"""Do the multipliers of feasible learning find swapped pairs?

    python scripts/evidence/flip_ranking.py --data ../shared/data/tinystories_pairs/train.jsonl --seeds 5
    python scripts/evidence/flip_ranking.py --data ../shared/data/ultrafeedback_1k/train.jsonl --seeds 1 \
        --flips ../shared/data/ultrafeedback_1k/flip20_source_index.jsonl --max-length 256

A fifth of the pairs is swapped (drawn with the seed, or those that a file names by ``source_index``), DPO
runs with the method, and the area under the ROC curve says how often a swapped pair ranks above one that is
not: by the multipliers (ties by the latest loss), and, for DPO itself (``erm``), by the latest loss. Prints
JSON last. Everything else is as in configs/preference/feasible_stories.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from posttrain import DPOTrainer
from posttrain.evaluation.seeds import over_seeds, paired_over_seeds
from posttrain.preference.feasible import Feasible

ARMS = {
    "memory": {"dual_lr": 0.5, "alpha": 4.0},
    "erm": {"mode": "erm"},
    "published": {},
}


def auc(order: list[int], swapped: set[int]) -> float:
    """Return the share of (swapped, not swapped) pairs that ``order``, hardest first, has right."""
    right, above = 0, 0
    for row in order:
        if row in swapped:
            above += 1
        else:
            right += above
    return right / (above * (len(order) - above))


def one(arguments: argparse.Namespace, rows: list[dict[str, str]], arm: str, seed: int) -> dict[str, float]:
    """Train one arm and rank its pairs."""
    if arguments.flips is None:
        swapped = set(random.Random(seed).sample(range(len(rows)), round(0.2 * len(rows))))
    else:
        named = {json.loads(line)["source_index"] for line in arguments.flips.read_text().splitlines()}
        swapped = {place for place, row in enumerate(rows) if row["source_index"] in named}
    sides = ("chosen", "rejected")
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": row[sides[place in swapped]],
            "rejected": row[sides[place not in swapped]],
        }
        for place, row in enumerate(rows)
    ]
    method = Feasible(**ARMS[arm])
    load = AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=load(arguments.model),
            ref_model=load(arguments.model),
            args=DPOConfig(
                output_dir=folder,
                num_train_epochs=arguments.epochs,
                max_steps=arguments.max_steps,
                beta=0.1,
                learning_rate=5e-4,
                lr_scheduler_type="cosine",
                warmup_steps=6,
                per_device_train_batch_size=16,
                max_length=arguments.max_length,
                gradient_checkpointing=False,
                use_cpu=not torch.accelerator.is_available(),
                bf16=False,
                seed=seed,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            methods=[method],
        )
        trainer.train()
    order = method.table.hardest()
    if arm == "erm":
        order = order[torch.argsort(method.table.losses[order], descending=True, stable=True)]
    swapped &= set(order.tolist())  # of pairs that are too long none was visited
    found = auc(order.tolist(), swapped)
    top = order[: len(swapped)].tolist()
    return {
        "auc": found,
        "precision": fmean(row in swapped for row in top),
        "cvar": method.table.summary()["cvar_0.8"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="../shared/checkpoints/stories260K")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--flips", type=Path)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rows", type=int, help="the first so many pairs only")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    rows = rows[: arguments.rows]
    arms = arguments.arms
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for seed in range(arguments.seeds):
        for arm in arms:
            found[arm].append(one(arguments, rows, arm, seed))
            print(json.dumps({"arm": arm, "seed": seed, **found[arm][-1]}), flush=True)
    columns = {
        name: {arm: [row[name] for row in found[arm]] for arm in arms}
        for name in ("auc", "precision", "cvar")
    }
    result = {
        "rows": len(rows),
        "runs": found,
        "means": {n: {arm: over_seeds(v).to_dict() for arm, v in c.items()} for n, c in columns.items()},
        "auc_minus_erm": {
            arm: paired_over_seeds(columns["auc"]["erm"], columns["auc"][arm]).to_dict()
            for arm in arms
            if "erm" in arms and arm != "erm"
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
