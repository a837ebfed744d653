"""Run by test_fsdp.py on two ranks under accelerate's FSDP2: python fsdp_ranks.py FOLDER."""

import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("launch", "rollout", "run"))

import launch_runs
import runs
import support
import torch
from accelerate import PartialState
from peft import PeftModel
from run_jobs import write_config
from sharding import sharded
from test_updates import Engine
from transformers import TrainerCallback

from posttrain import GRPOTrainer
from posttrain.cli import app
from posttrain.preference import TDPO
from posttrain.rl import ACE
from posttrain.rollout.updates import WeightStream
from posttrain.sharding import ShardingError, is_split


def train(name, folder):
    """Train a run to its end under FSDP2; return what came out, on ranks but the first without logs."""
    options = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} if name == "loaded" else {}
    with sharded(**options):
        trainer = runs.RUNS[name](folder / f"{name}2", 2)
        trainer.train()
        split = all(is_split(parameter) for parameter in trainer.model.parameters())
        return outcome(trainer) | {"split": split}


def outcome(trainer):
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"logs": logs, "weights": support.weights(trainer.plain_model())}


def resume(name, folder):
    """Train to the end, then go on from the middle of that; return both outcomes, and what was saved."""
    build, kind = runs.RESUMED[name]
    found = {}
    for way in ("straight", "resumed"):
        with sharded(FSDP_STATE_DICT_TYPE=kind):
            trainer = build(folder / f"resume-{name}", 2)
            start = str(folder / f"resume-{name}" / "checkpoint-3") if way == "resumed" else None
            trainer.train(resume_from_checkpoint=start)
            trainer.save_model(str(folder / f"saved-{name}"))
            found[way] = outcome(trainer)
            beside = getattr(trainer, "modules_of_methods", {}).get("sparse_po")
            if beside is not None:
                found[way]["weights"] |= support.weights(beside)
    return found


def equal(name, folder):
    """One of the four runs of the bar."""
    with sharded():
        return launch_runs.carry_out(launch_runs.RUNS[name], folder / f"{name}-2", 2)


def stream(build, folder):
    """What a rollout engine is told while a run goes on, and the model that it should then have."""
    with sharded():
        trainer = build(folder, 2)
        sent = WeightStream(trainer.model, lambda: trainer.selection)
        engine = Engine(sent)  # before FSDP2 splits anything
        taken = []
        trainer.add_callback(OnStep(lambda: taken.append(engine.sync())))
        trainer.train()
        model = trainer.plain_model()
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        names = [sorted(update.name for update in updates) for updates in taken]
        numbers = sum(update.values.numel() for update in taken[-1])
        wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return {"held": engine.tensors, "wanted": wanted, "names": names, "numbers": numbers}


class OnStep(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        self.action()


def generate(folder):
    """Sample with weights that are split: ranks go on until the longest answer of any ends."""
    lengths = []

    def reward(completion_ids, **kwargs):
        lengths.append(max(len(ids) for ids in completion_ids))
        return [-float(len(ids)) for ids in completion_ids]

    model = support.model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 8  # the end of an answer
    with sharded():
        args = support.grpo_config(
            folder, per_device_train_batch_size=2, num_generations=2, max_completion_length=40, max_steps=3
        )
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=reward,
            train_dataset=support.prompts(),
            processing_class=support.tokenizer(),
            methods=[ACE()],
        )
        trainer.train()
    return lengths


def half(folder, methods):
    """Train in mixed precision; return the entropies that were logged, and the first loss."""
    with sharded():
        trainer = runs.dpo(folder, 2, methods, bf16=True, max_steps=2)
        trainer.train()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        return [row["entropy"] for row in logs], logs[0]["loss"]


def refused(folder):
    """Return why a head that trains beside an adapter cannot be sharded."""
    with sharded():
        try:
            runs.dpo(folder, 2, [], peft_config=support.lora(modules_to_save=["lm_head"]))
        except ShardingError as error:
            return str(error)
    return None


def whole_run(folder):
    """A run of the command line: warm start, training, evaluation, export."""
    changes = {"trainer": {"per_device_train_batch_size": 8, "max_steps": 3, "save_steps": 2}}
    warm = {"warm_start": {"trainer": {"max_steps": 2, "per_device_train_batch_size": 8}}}
    if PartialState().is_main_process:
        write_config(folder, folder / "run", warm, changes, {"evaluate": {"before": False}})
    PartialState().wait_for_everyone()
    with sharded(FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        app(["train", str(folder / "config.yaml"), "--json"], standalone_mode=False)


def main(folder):
    torch.set_num_threads(1)
    PartialState(cpu=True)
    found = {
        "runs": {name: train(name, folder) for name in runs.RUNS},
        "bar": {name: equal(name, folder) for name in launch_runs.RUNS},
        "resumed": {name: resume(name, folder) for name in runs.RESUMED},
        "stream": {
            name: stream(runs.RUNS[name], folder / f"stream-{name}") for name in ("packed", "adapter")
        },
        "lengths": generate(folder / "generate"),
        "half": {"ours": half(folder / "half", [TDPO(alpha=0.5)]), "trl": half(folder / "half", [])},
        "refused": refused(folder / "refused"),
    }
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    whole_run(folder / "whole")
    support.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
