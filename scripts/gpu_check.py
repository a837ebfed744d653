r"""What an owner of a GPU runs once: everything that CI, which has none, cannot see; JSON on stdout.

    bash scripts/gpu_check.sh                      # about 15 minutes on one 80 GB GPU
    bash scripts/gpu_check.sh --only kernels       # one part; repeatable
    bash scripts/gpu_check.sh --dry-run            # the same code at toy size, on a CPU too

Parts, each in a process of its own:

=========  ============================================================================================
part       what it does
=========  ============================================================================================
kernels    values and gradients of the kernels at the vocabulary of the model, in the types of a GPU,
           against full logits in float64
tests      the tests marked ``gpu``
grpo       ``scripts/bench/bench_step.py``: GRPO with ACE, SPINE and Lp-Reg beside TRL's, full and LoRA
dpo        ``scripts/bench/bench_preference.py``: DPO with TDPO, SparsePO and others beside TRL's
sft        ``scripts/bench/bench_selection.py``: SFT with HFT and packed selections beside TRL's
vllm       GRPO with rollouts of a vLLM engine in the trainer's process: gap of the log-probabilities, bytes
           sent, tokens per second (left out where vLLM is not installed)
processes  two processes against one by ``posttrain train``, packed selection: FSDP2 of
           ``configs/accelerate/fsdp2.yaml`` where there are two GPUs, plain DDP in a dry run on CPUs
=========  ============================================================================================

The model has the shape of Qwen2.5-0.5B with random weights in bfloat16; nothing is downloaded. Speed and
memory are ratios to plain TRL taken in pairs, see the benchmarks. The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "bench"))

import torch
import yaml
from common import SIZES, model, quiet, tokenizer

from posttrain.run.manifest import hardware, source_commit, versions

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "scripts" / "bench"
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest error of a part, relative to the largest value: sums in fp32, and rounding of 16-bit gradients."""


class Failed(RuntimeError):
    """A part did not do what it should; the message says what."""


# ---- kernels -----------------------------------------------------------------------------------------------


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Compare values and gradients of every kernel with full logits in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    types = [torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else [])]
    size = SIZES[options.size]
    found, worst = {}, []
    for dtype in types:
        errors = kernel_errors(
            device, dtype, tokens=64, hidden=size["hidden_size"], vocabulary=size["vocab_size"]
        )
        found[str(dtype).removeprefix("torch.")] = errors
        worst += [
            f"{name} in {dtype}: {error:.1e}" for name, error in errors.items() if not error < LIMITS[dtype]
        ]
    if worst:
        raise Failed(f"beyond the limits: {'; '.join(worst)}")
    return found


def kernel_errors(
    device: str, dtype: torch.dtype, *, tokens: int, hidden: int, vocabulary: int
) -> dict[str, float]:
    """Return the largest error by value and gradient, relative to the largest exact number."""
    from posttrain.kernels import (
        LMHead,
        entropies_with_gradient,
        filtered_forward_kl,
        score_against_reference,
        token_statistics,
    )

    draw = torch.Generator().manual_seed(0)
    shapes = {"hidden": (tokens, hidden), "ref": (tokens, hidden), "weight": (vocabulary, hidden)}
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    made["weight"] *= 2 * hidden**-0.5  # logits of a trained model: some nats apart
    made = {name: value.to(device, dtype) for name, value in made.items()}
    ids = torch.randint(vocabulary, (tokens,), generator=draw).to(device)
    exact = {name: value.double().requires_grad_(name != "ref") for name, value in made.items()}
    ours = {name: value.clone().requires_grad_(name != "ref") for name, value in made.items()}
    logps = (exact["hidden"] @ exact["weight"].t()).log_softmax(dim=-1)
    ref = (exact["ref"] @ exact["weight"].detach().t()).log_softmax(dim=-1)
    at = logps.gather(1, ids.unsqueeze(1)).squeeze(1)
    entropy = -(logps.exp() * logps).sum(dim=-1)
    kl = (ref.exp() * (ref - logps)).sum(dim=-1)
    least = logps.detach().amax(dim=-1, keepdim=True) + torch.tensor(0.05, dtype=torch.float64).log()
    proxy = logps.detach().masked_fill(logps.detach() < least, -torch.inf).log_softmax(dim=-1)
    kept = torch.where(proxy.isfinite(), proxy.exp() * (proxy - logps), 0.0).sum(dim=-1)
    errors = {}

    def compare(name: str, value: torch.Tensor, wanted: torch.Tensor, gradients: bool = True) -> None:
        errors[name] = _relative(value, wanted)
        if not gradients:
            return
        inputs = ("hidden", "weight")
        got = torch.autograd.grad(value.sum(), [ours[i] for i in inputs])
        want = torch.autograd.grad(wanted.sum(), [exact[i] for i in inputs], retain_graph=True)
        for place, one, other in zip(inputs, got, want, strict=True):
            errors[f"{name}/d{place}"] = _relative(one, other)

    statistics = token_statistics(ours["hidden"].detach(), ours["weight"].detach(), ids, entropy=True)
    compare("statistics/logps", statistics.logps, at, gradients=False)
    assert statistics.entropies is not None
    compare("statistics/entropies", statistics.entropies, entropy, gradients=False)
    values = entropies_with_gradient(statistics.entropies, ours["hidden"], ours["weight"])
    compare("entropies", values, entropy)
    compare("filtered_kl", filtered_forward_kl(ours["hidden"], ours["weight"], min_ratio=0.05), kept)
    head, frozen = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    head.weight = torch.nn.Parameter(ours["weight"].detach().clone())
    frozen.weight = torch.nn.Parameter(ours["weight"].detach().clone(), requires_grad=False)
    ours["weight"] = head.weight

    def scores() -> Any:
        return score_against_reference(ours["hidden"], LMHead(head), ours["ref"], LMHead(frozen), ids)

    compare("score/logps", scores().logps, at)
    compare("score/kl", scores().kl, kl)
    compare("score/entropies", scores().entropies, entropy, gradients=False)
    return errors


def _relative(value: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.detach()
    return float((value.detach().double() - wanted).abs().max() / wanted.abs().max())


# ---- rollouts ----------------------------------------------------------------------------------------------


def vllm(options: argparse.Namespace) -> dict[str, Any]:
    """Train GRPO with an engine in this process; return what its logs say."""
    from datasets import Dataset
    from trl import GRPOConfig

    from posttrain import GRPOTrainer
    from posttrain.rl import ACE

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model(options.size, torch.bfloat16),
            args=GRPOConfig(
                output_dir=folder,
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
                use_vllm=True,
                vllm_mode="colocate",
                vllm_gpu_memory_utilization=0.3,
                vllm_max_model_length=1024,
                per_device_train_batch_size=8 if options.dry_run else 32,
                num_generations=8,
                max_completion_length=16 if options.dry_run else 512,
                learning_rate=1e-5,
                max_steps=3 if options.dry_run else 20,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            reward_funcs=lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids],
            train_dataset=Dataset.from_dict({"prompt": ["a a a a"] * 64}),
            processing_class=tokenizer(),
            methods=[ACE()],
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    rows = [row for row in trainer.state.log_history if "loss" in row]
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in rows]
    tokens = rows[-1]["num_tokens"]
    report = {
        "gap_mean": sum(gaps) / len(gaps),
        "gap_last": gaps[-1],
        "steps": len(rows),
        "seconds": seconds,
        "tokens_per_second_of_training": tokens / seconds,
        **{
            key: value
            for key, value in rows[-1].items()
            if key.split("/")[0] in ("rollout_gap", "weight_sync")
        },
    }
    if not report["gap_mean"] < 0.05:
        raise Failed(f"rollout and trainer differ by {report['gap_mean']:.3g} nats per token")
    return report


# ---- several processes -------------------------------------------------------------------------------------


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Train a packed selection on two processes and on one, by the command line; compare losses."""
    gpus = torch.cuda.device_count()
    name = "fsdp2" if gpus >= 2 else "cpu_ddp"
    steps, rows = (3, 8) if options.dry_run else (20, 16)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        settings = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
        launcher = folder / "launcher.yaml"
        launcher.write_text(yaml.safe_dump(settings | {"num_processes": 2, "mixed_precision": "no"}))
        accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(launcher)]
        losses = {}
        for ranks, start in ((1, []), (2, accelerate)):
            values = [
                f"run_dir={folder}/{ranks}",
                f"trainer.max_steps={steps}",
                f"trainer.per_device_train_batch_size={rows // ranks}",
                "trainer.bf16=false",
                "trainer.logging_steps=1",
                "trainer.max_grad_norm=0.5",
                "selection.random.budget=0.05",
                "evaluate=null",
                "rewards=[]",
            ]
            config = ROOT / "configs" / "sft" / "chain_sum_cpu.yaml"
            one = {"CUDA_VISIBLE_DEVICES": "0"} if ranks == 1 and gpus else {}
            _run([sys.executable, *start, "-m", "posttrain", "train", str(config), *values], one)
            logged = [json.loads(line) for line in (folder / str(ranks) / "metrics.jsonl").open()]
            losses[ranks] = [row["loss"] for row in logged if "loss" in row]
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses[1], losses[2], strict=True))
    report = {"launched_with": name, "steps": steps, "losses": losses[2], "largest_difference": worst}
    if not worst < 1e-4:
        raise Failed(f"losses of two processes differ by {worst:.1e} from those of one")
    return report


# ---- all of it ---------------------------------------------------------------------------------------------


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return what runs each part, after the interpreter."""
    small = options.dry_run
    size = ["--size", options.size]
    grpo, dpo, sft = (str(BENCH / f"bench_{name}.py") for name in ("step", "preference", "selection"))
    own = [str(Path(__file__)), *(["--dry-run"] if small else [])]
    methods = ["--method", "ace+spine+lp_reg"]
    arms = ["--arm", 'tdpo={"tdpo": {}}', "--arm", 'sparse_po={"sparse_po": {}}']
    selections = ["--arm", "hft=hft {}", "--arm", 'packed=random {"budget": 0.01}']
    if small:
        grpo_more = ["--tokens", "8", "--rollouts", "3", "--warmup", "1", "--no-memory"]
        dpo_more = ["--tokens", "16", "--shortest", "8", "--steps", "4", "--warmup", "1", "--no-memory"]
        sft_more = ["--tokens", "8", "--rows", "2", "--steps", "4", "--warmup", "1", "--no-memory"]
    else:
        methods += ["--method", "ace", "--method", "spine", "--method", "lp_reg", "--adapter", "full"]
        grpo_more = ["--adapter", "lora", "--tokens", "512", "--rollouts", "20", "--dtype", "bfloat16"]
        arms += ["--arm", 'mapo={"sparse_po": {"token_mask": "mapo"}}', "--arm", 'rpo={"rpo": {}}']
        dpo_more = ["--tokens", "512", "--shortest", "128", "--prompt", "64", "--dtype", "bfloat16"]
        sft_more = ["--tokens", "512", "--rows", "8"]
    tests = ["tests/kernels"] if small else ["tests"]
    return {
        "kernels": [*own, "--part", "kernels"],
        "tests": ["-m", "pytest", "-q", "-m", "gpu", *tests],
        "grpo": [grpo, *size, *methods, *grpo_more],
        "dpo": [dpo, *size, *arms, *dpo_more],
        "sft": [sft, *size, *selections, *sft_more],
        "vllm": [*own, "--part", "vllm"],
        "processes": [*own, "--part", "processes"],
    }


def left_out(part: str, options: argparse.Namespace) -> str | None:
    """Return why a part does not run on this machine, or None."""
    if part == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install '.[vllm]')"
    if part == "processes" and torch.cuda.device_count() < 2 and not options.dry_run:
        return f"FSDP2 needs two GPUs, found {torch.cuda.device_count()}"
    return None


def _run(arguments: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 5):  # 5: pytest found no test
        raise Failed(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def carry_out(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own; return its row of the report."""
    reason = left_out(part, options)
    if reason is not None:
        return {"state": "left out", "reason": reason}
    started = time.perf_counter()
    try:
        out = _run([sys.executable, *commands(options)[part]], {"PYTHONPATH": _path()}).strip()
    except Failed as error:
        return {"state": "failed", "seconds": time.perf_counter() - started, "error": str(error)}
    result: Any = out.split("\n")[-1] if part == "tests" else json.loads(out)
    return {"state": "done", "seconds": time.perf_counter() - started, "result": result}


def _path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "kernels": kernels,
    "vllm": vllm,
    "processes": processes,
}


def main() -> int:
    """Run what was asked for, print the report."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="toy size; on a CPU too")
    made.add_argument("--only", action="append", help="a part; repeatable (all)")
    made.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    made.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    options = made.parse_args()
    options.size = "tiny" if options.dry_run else "qwen0.5b"
    if options.part:
        quiet(options)
        print(json.dumps(PARTS[options.part](options), indent=2))
        return 0
    if not torch.cuda.is_available() and not options.dry_run:
        made.error("there is no CUDA device here: this checks one (--dry-run runs the same code on a CPU)")
    names = options.only or list(commands(options))
    unknown = set(names) - set(commands(options))
    if unknown:
        made.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(commands(options))}")
    report: dict[str, Any] = {
        "dry_run": options.dry_run,
        "size": options.size,
        "hardware": hardware(),
        "versions": versions(),
        "commit": source_commit(),
        "parts": {},
    }
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        report["parts"][name] = carry_out(name, options)
        print(f"{name}: {report['parts'][name]['state']}", file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))
    return int(any(part["state"] == "failed" for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
