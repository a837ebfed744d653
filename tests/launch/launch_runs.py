"""The four runs of the equality bar, and a script that carries them out alone or under any launcher.

    python tests/launch/launch_runs.py FOLDER [NAME...]
    accelerate launch --config_file configs/accelerate/cpu_zero3.yaml tests/launch/launch_runs.py FOLDER

Every run takes 20 optimiser steps of two micro-steps on the same 16 rows, however many processes there are;
rollouts are a function of the prompt and the step. FOLDER/NAME-MODE.pt gets losses and full weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "preference"))

import pairs
import support
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset

from posttrain import GRPOTrainer, SFTTrainer
from posttrain.preference.sparse_po import SparsePO
from posttrain.rl import ACE
from posttrain.rl.lp_reg import LpReg
from posttrain.rl.spine import Spine
from posttrain.selection.hft import HFT
from posttrain.selection.random_mask import RandomMask
from posttrain.selection.settings import Select

STEPS = 20
ROWS = 8  # of a micro-step, over all processes


def settings(ranks: int) -> dict[str, Any]:
    """What all runs share; ``ranks`` processes divide the rows."""
    return {
        "per_device_train_batch_size": ROWS // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "max_grad_norm": 0.5,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
    }


def completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The j-th completion of a prompt is a fixed pseudo-random string of 2 to 8 characters."""
    tokenizer = support.tokenizer()
    completion_ids = []
    for i, prompt in enumerate(prompts):
        about = f"{prompt}/{i % trainer.num_generations}/{trainer.state.global_step}"
        digest = hashlib.sha256(about.encode()).digest()
        completion_ids.append([3 + byte % 40 for byte in digest[: 2 + digest[-1] % 7]])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": completion_ids,
        "logprobs": None,
    }


def grpo(folder: Path, ranks: int) -> Any:
    """GRPO with ACE, SPINE and Lp-Reg."""
    return GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(folder, num_generations=4, **settings(ranks)),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout_func=completions,
        methods=[ACE(), Spine(fork_ratio=0.5), LpReg(rho=0.9, kappa=0.01, scope="generation_batch")],
    )


def dpo(folder: Path, ranks: int) -> Any:
    """DPO with SparsePO's learned masks."""
    return pairs.trainer(
        folder,
        methods=[SparsePO(mask_init="ones", mask_l1_reward=0.01)],
        data=pairs.rows(16),
        train_sampling_strategy="sequential",
        **settings(ranks),
    )


def sft(folder: Path, ranks: int, selection: Any = None, **more: Any) -> Any:
    """SFT on texts of different lengths, with tied embeddings."""
    rows = Dataset.from_dict({"text": [f"say {i} and {i * i}" + " more" * (i % 3) for i in range(16)]})
    return SFTTrainer(
        model=support.model(tied=True),
        args=support.sft_config(folder, train_sampling_strategy="sequential", **(settings(ranks) | more)),
        train_dataset=rows,
        processing_class=support.tokenizer(),
        selection=selection,
    )


def hft(folder: Path, ranks: int) -> Any:
    """SFT of a random half of each block's tensors."""
    return sft(folder, ranks, HFT(seed=3))


def packed(folder: Path, ranks: int) -> Any:
    """SFT of 5 % of all scalars, packed."""
    return sft(folder, ranks, Select(RandomMask(budget=0.05, seed=1), weight_decay="selected"))


RUNS: dict[str, Callable[[Path, int], Any]] = {"grpo": grpo, "dpo": dpo, "hft": hft, "packed": packed}


def carry_out(build: Callable[[Path, int], Any], folder: Path, ranks: int) -> dict[str, Any]:
    """Train, and return losses, gradient norms and weights (those of methods included)."""
    torch.manual_seed(0)
    run = build(folder, ranks)
    run.train()
    logs = [row for row in run.state.log_history if "loss" in row]
    if getattr(run, "selection", None) is not None:
        run.end_selection()
    weights = support.whole(run.accelerator.unwrap_model(run.model))
    for name, module in getattr(run, "modules_of_methods", {}).items():
        weights |= {f"{name}.{key}": value for key, value in support.whole(module).items()}
    return {
        "mode": run.accelerator.distributed_type.value,
        "losses": [row["loss"] for row in logs],
        "norms": [row["grad_norm"] for row in logs],
        "weights": weights,
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of losses, and largest absolute one of weights."""
    assert one["weights"].keys() == other["weights"].keys()
    assert len(one["losses"]) == len(other["losses"]) == STEPS
    # a policy-gradient loss passes through 0: relative to its size over the run where that is larger
    size = sum(map(abs, one["losses"])) / STEPS
    losses = (abs(a - b) / max(abs(a), size) for a, b in zip(one["losses"], other["losses"], strict=True))
    weights = (float((one["weights"][n] - other["weights"][n]).abs().max()) for n in one["weights"])
    return max(losses), max(weights)


def reset() -> None:
    """Let the next trainer of this process make its own accelerator; the process group stays."""
    GradientState._reset_state()
    AcceleratorState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    processes = PartialState(cpu=True).num_processes
    for run_name in sys.argv[2:] or RUNS:
        result = carry_out(RUNS[run_name], out / f"{run_name}-{processes}", processes)
        if PartialState().is_main_process:
            torch.save(result, out / f"{run_name}.pt")
        reset()
    support.leave()
