"""Ranked lists for LiPO: K sampled continuations of every prompt of a configuration, scored by its reward.

    python scripts/evidence/preference_lists.py configs/preference/dpo_stories.yaml \\
        --out runs/evidence/lists.jsonl

Each line has ``prompt``, ``completions`` and ``scores`` in [0, 1], as methods.lipo reads them. The same
configuration, model and seed give the same file. Lists whose scores are all equal are left out and counted.
"""

import argparse
import json
from pathlib import Path

import torch

from posttrain.config.check import load_run_config
from posttrain.data import load_data, render
from posttrain.evaluation.generate import encode_prompt, sample
from posttrain.models.load import load_model
from posttrain.rewards import build_rewards

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("config", type=Path, help="configuration with a model, prompts and a reward")
parser.add_argument("--out", type=Path, default=Path("runs/lists.jsonl"), help="the file to write")
parser.add_argument("--size", type=int, default=8, help="K, continuations of a prompt")
parser.add_argument("--prompts", type=int, default=None, help="use the first so many prompts")
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--max-new-tokens", type=int, default=80)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
config = load_run_config(options.config)
data = load_data(config.data, config.task, hold_out=config.data.eval.file is None)
model, tokenizer = load_model(config.model)
rows = render(data.train, tokenizer, config.data).select(range(options.prompts or len(data.train)))
(reward,) = build_rewards(config.rewards[:1], data)
groups = sample(
    model,
    tokenizer,
    rows["prompt"][:],
    n=options.size,
    temperature=options.temperature,
    max_new_tokens=options.max_new_tokens,
    seed=options.seed,
)


def written(prompt: str | list, completion) -> str:
    """A continuation of text keeps the space it begins with, which decoding it alone drops."""
    if not isinstance(prompt, str):
        return completion.text
    ids = encode_prompt(tokenizer, prompt)
    start, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, ids + completion.token_ids)
    )
    return whole[len(start) :]


lists, alike = [], 0
for row, group in zip(rows, groups, strict=True):
    texts = [written(row["prompt"], completion) for completion in group]
    scores = [verdict.score for verdict in reward.verify(texts, [row] * len(texts))]
    if None in scores:
        raise SystemExit(f"the reward gives no score for a continuation of {row['prompt']!r}")
    if len(set(scores)) == 1:
        alike += 1
    else:
        lists.append({"prompt": row["prompt"], "completions": texts, "scores": scores})
reward.close()
options.out.parent.mkdir(parents=True, exist_ok=True)
options.out.write_text("".join(json.dumps(row) + "\n" for row in lists))
print(f"{options.out}: {len(lists)} lists of {options.size}, {alike} left out because all scores are equal")
