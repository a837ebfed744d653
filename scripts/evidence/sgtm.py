"""SGTM with missed labels, against filtering and plain training: what is kept, and how fast it is relearned.

    python scripts/evidence/sgtm.py --seeds 3

A small Llama learns two skills from scratch: reversing words (to retain) and sums of two numbers (to forget).
Of the rows to forget a part has lost its label. Arms: ``plain`` trains on everything, ``filter`` drops the
labelled rows, ``sgtm`` trains on everything and ablates its units, ``never`` trains without any row to
forget. Printed are the mean token NLL (nats) on held-out rows of both skills after training, and the
optimiser steps in which a copy relearns the sums, as far as plain training had them plus a margin.
"""

import argparse
import tempfile
from statistics import fmean

import torch
from datasets import Dataset
from trl import SFTConfig

from posttrain import SFTTrainer
from posttrain.models.embedded import build_model, build_tokenizer
from posttrain.selection.gradient_sums import mean_token_nll
from posttrain.sft.relearn import relearn, steps_to
from posttrain.sft.sgtm import SGTM


def texts(kind: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return prompts and completions of a skill."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        if kind == "retain":
            letters = torch.randint(26, (4,), generator=draw).tolist()
            word = "".join(chr(97 + letter) for letter in letters)
            found.append((f"reverse {word}:", f" {word[::-1]}"))
        else:
            one, two = torch.randint(50, (2,), generator=draw).tolist()
            found.append((f"add {one}+{two}:", f" {one + two}"))
    return found


def batches(pairs: list[tuple[str, str]], size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Return padded batches whose labels are the completions."""
    tokenizer = build_tokenizer()
    found = []
    for start in range(0, len(pairs), size):
        rows = [
            (tokenizer(p)["input_ids"], [*tokenizer(c)["input_ids"], 2])
            for p, c in pairs[start : start + size]
        ]
        longest = max(len(p) + len(c) for p, c in rows)
        ids, labels = (
            torch.zeros(len(rows), longest, dtype=torch.long),
            torch.full((len(rows), longest), -100),
        )
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            ids[row, :end] = torch.tensor([*prompt, *completion])
            labels[row, len(prompt) : end] = torch.tensor(completion)
        found.append({"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()})
    return found


def nll(model: torch.nn.Module, held_out: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean over batches."""
    with torch.no_grad():
        return fmean(mean_token_nll(model, batch).item() for batch in held_out)


def trained(arm: str, seed: int, options: argparse.Namespace) -> torch.nn.Module:
    """Return the model of an arm."""
    rows = [(*pair, False) for pair in texts("retain", 3000, seed)]
    for number, pair in enumerate(texts("forget", 1000, seed + 1)):
        missed = number < options.missed * 1000
        if arm in ("plain", "sgtm") or (arm == "filter" and missed):
            rows.append((*pair, None if missed else True))
    prompts, completions, marks = zip(*rows, strict=True)
    data = Dataset.from_dict(
        {"prompt": list(prompts), "completion": list(completions), "forget": [*marks, None][: len(rows)]}
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=build_model(seed),
            args=SFTConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=32,
                learning_rate=2e-3,
                weight_decay=0.1,
                seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=1000,
            ),
            train_dataset=data,
            processing_class=build_tokenizer(),
            methods=[]
            if arm != "sgtm"
            else [SGTM(mlp_units=options.units, choose="last", silence_first=False, retain_mask_prob=0.25)],
        )
        trainer.train()
    return trainer.model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--units", type=int, default=64, help="dedicated hidden units of 448")
    parser.add_argument(
        "--missed", type=float, default=0.2, help="share of the rows to forget without a label"
    )
    parser.add_argument(
        "--margin", type=float, default=0.1, help="nats above plain training that count as relearned"
    )
    parser.add_argument("--relearn", type=int, default=200, help="most optimiser steps of relearning")
    parser.add_argument("--arms", nargs="+", default=["plain", "filter", "sgtm", "never"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    held_out = {kind: batches(texts(kind, 256, 10**6)) for kind in ("retain", "forget")}
    again = batches(texts("forget", 512, 10**6 + 1))
    print("seed  arm     retain NLL  forget NLL  relearned after", flush=True)
    for seed in range(options.seeds):
        target = None
        for arm in options.arms:
            model = trained(arm, seed, options)
            found = {kind: nll(model, held_out[kind]) for kind in held_out}
            target = found["forget"] + options.margin if target is None else target
            curve = relearn(
                model, again, held_out["forget"], learning_rate=1e-3, steps=options.relearn, every=5
            )
            steps = steps_to(curve, target)
            after = f"{steps} steps" if steps is not None else f"more than {options.relearn} steps"
            print(f"{seed:4}  {arm:6}  {found['retain']:10.4f}  {found['forget']:10.4f}  {after}", flush=True)
