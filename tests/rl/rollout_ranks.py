"""Run by test_rl_rollout_ranks.py under one or several processes: rollouts depend on prompts alone."""

import hashlib
import json
import sys
from pathlib import Path

import support
import torch

from posttrain import GRPOTrainer
from posttrain.rl.registry import build


def written(prompt, number, temperature=1.0):
    """The ``number``-th completion of a prompt: a pseudo-random string of 2 to 8 characters."""
    digest = hashlib.sha256(f"{prompt}/{number}/{temperature:g}".encode()).digest()
    return [3 + byte % 40 for byte in digest[: 2 + digest[-1] % 7]]


def even(completions, **_):
    """Right when the last letter stands at an even place; a third of the groups of four is dead."""
    return [float(ord(text[-1]) % 3 == 0) for text in completions]


class FixedRollouts(GRPOTrainer):
    """Writes what :func:`written` says, at whatever temperature the generation runs."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        prompts = self._tokenizer.batch_decode(prompt_ids)
        first = self.accelerator.process_index * len(prompts)
        at = self.generation_config.temperature
        ids = [written(p, (first + i) % self.num_generations, at) for i, p in enumerate(prompts)]
        return ids, None


def main(out: str, settings: str) -> None:
    torch.set_num_threads(1)
    given = json.loads(settings)
    trainer = FixedRollouts(
        model=support.model(),
        args=support.grpo_config(Path(out).parent / "checkpoints", **{"max_steps": 5, **given["trainer"]}),
        reward_funcs=even,
        train_dataset=support.prompts(48),
        processing_class=support.tokenizer(),
        methods=build(given["methods"]),
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        logs = [
            {k: v for k, v in row.items() if k in ("loss", "grad_norm", "reward") or k in given["keys"]}
            for row in trainer.state.log_history
            if "loss" in row
        ]
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        table = [(r["prompt"], r["completion"], r["advantage"]) for r in trainer.last_completions()]
        Path(out).write_text(json.dumps({"logs": logs, "weights": weights, "table": table}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
    support.leave()
