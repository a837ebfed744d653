"""A stream of preference domains: what DPO, OFS-DPO and COFS-DPO learn of each, and what they keep.

    python scripts/evidence/online_preference.py

``dpo`` and ``ofs`` go from domain to domain with one adapter. ``cofs`` learns every domain from the base with
OFS-DPO and combines what came out, with coefficients fitted on a few held-out pairs of each domain seen so
far (an experimental method, see ``posttrain methods ofs_dpo``). The reference is the base throughout. Prints,
after every domain, loss and accuracy on test pairs of each, and writes all of it to OUT/result-SEED.json.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from posttrain import DPOTrainer
from posttrain.merging.average import average
from posttrain.preference.cofs import Buffer, buffer_loss, fit
from posttrain.preference.ofs_dpo import OFSDPO

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="../shared/checkpoints/stories260K", help="Hub id or folder")
parser.add_argument("--data", default="../shared/data", help="folder of the three domains")
parser.add_argument("--steps", type=int, default=40, help="steps per domain")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--arms", nargs="+", default=["dpo", "ofs", "cofs"])
parser.add_argument("--alpha", type=float, default=0.1, help="weight of the chase")
parser.add_argument("--out", type=Path, default=Path("runs/evidence/online_preference"))
options = parser.parse_args()

torch.set_num_threads(1)  # more threads only get in each other's way at this size
# TRL asks for bfloat16 on a GPU unless told otherwise
machine = {} if torch.accelerator.is_available() else {"use_cpu": True, "bf16": False}
BETA, TEST, BUFFER, LONGEST = 0.1, 60, 12, 140
tokenizer = AutoTokenizer.from_pretrained(options.model)


def rows(name: str, file: str) -> Dataset:
    """Pairs that differ, of which prompt and answers leave room for each other."""
    found = load_dataset("json", data_files=f"{options.data}/{name}/{file}.jsonl", split="train")
    found = found.select_columns(["prompt", "chosen", "rejected"]).filter(
        lambda row: row["chosen"] != row["rejected"] and len(tokenizer(row["prompt"])["input_ids"]) < LONGEST
    )
    return found.shuffle(seed=7)


domains = {}
for name, file in (("tinystories_pairs", "train"), ("instruct_pref", "train"), ("hh_harmless", "pairs")):
    found = rows(name, file)
    cut = [range(TEST), range(TEST, TEST + BUFFER), range(TEST + BUFFER, len(found))]
    domains[name] = tuple(found.select(part) for part in cut)


def base() -> torch.nn.Module:
    """The base model, anew."""
    return AutoModelForCausalLM.from_pretrained(options.model)


def fresh() -> PeftModel:
    """The base with an adapter that does nothing yet."""
    torch.manual_seed(options.seed)
    return get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def train(policy: PeftModel, data: Dataset, method: str) -> DPOTrainer:
    """Train the adapter of ``policy`` on one domain."""
    trainer = DPOTrainer(
        model=policy,
        ref_model=base(),
        args=DPOConfig(
            output_dir=str(options.out / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            beta=BETA,
            learning_rate=3e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            max_length=LONGEST + 60,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            disable_tqdm=True,
            **machine,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        methods=[] if method == "dpo" else [OFSDPO(alpha=options.alpha, interval=10)],
    )
    trainer.train()
    return trainer


# a trainer that never trains turns pairs into batches
prepare = {
    part: {
        name: DPOTrainer(
            model=fresh(),
            args=DPOConfig(
                output_dir=str(options.out / "trainer"), max_length=LONGEST + 60, report_to="none", **machine
            ),
            train_dataset=data[part],
            processing_class=tokenizer,
        )
        for name, data in domains.items()
    }
    for part in (0, 1)
}
blank = fresh()
tests, buffers = (
    {
        name: Buffer.of(blank, made.data_collator(list(made.train_dataset)))
        for name, made in prepare[part].items()
    }
    for part in (0, 1)
)


def judge(policy: PeftModel) -> dict[str, list[float]]:
    """Return loss and accuracy on the test pairs of every domain."""
    policy.eval()
    with torch.no_grad():
        return {
            name: [buffer_loss(policy, test, BETA).item(), accuracy(policy, test)]
            for name, test in tests.items()
        }


def accuracy(policy: PeftModel, buffer: Buffer) -> float:
    """Return the share of pairs whose chosen answer gained more over the base."""
    chosen, rejected = buffer.log_ratios(policy).chunk(2)
    return (chosen > rejected).float().mean().item()


result: dict[str, list] = {}
for arm in options.arms:
    policy, modules = fresh(), []
    result[arm] = []
    for name, data in domains.items():
        policy = train(fresh() if arm == "cofs" else policy, data[2], arm).model
        about = {}
        if arm == "cofs":
            modules.append(options.out / f"{name}-{options.seed}")
            policy.save_pretrained(modules[-1])
        if len(modules) > 1:
            policy = PeftModel.from_pretrained(base(), modules[0], adapter_name=modules[0].name)
            for module in modules[1:]:
                policy.load_adapter(module, module.name)
            seen = [buffers[other] for other in list(domains)[: len(modules)]]
            found = fit(policy, [module.name for module in modules], seen, beta=BETA)
            about["coefficients"] = list(found.coefficients.values())
            folder = options.out / f"combined-{len(modules)}-{options.seed}"
            shutil.rmtree(folder, ignore_errors=True)
            average(modules, folder, weights=about["coefficients"])
            policy = PeftModel.from_pretrained(base(), folder)
        result[arm].append({"after": name, **about, "tests": judge(policy)})
        print(arm, json.dumps(result[arm][-1]), flush=True)
options.out.mkdir(parents=True, exist_ok=True)
(options.out / f"result-{options.seed}.json").write_text(json.dumps(result, indent=1))
