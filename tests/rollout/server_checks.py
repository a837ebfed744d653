"""Runs against a real vLLM server on this machine's CPU; FOLDER/found.json has what each found.

.venv-vllm/bin/python tests/rollout/server_checks.py FOLDER
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import support
import torch

from posttrain import GRPOTrainer
from posttrain.rollout.files import EXTENSION
from posttrain.rollout.settings import RolloutSettings

STEPS = 6
KILLED = 3  # the step in whose rewards the server dies


class Server:
    """``vllm serve``, in a process group that can be killed like a machine that goes down."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.model, self.log = model, log
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {self.model} "
                f"--dtype float32 --logprobs-mode processed_logprobs --worker-extension-cls {EXTENSION} "
                f"--enforce-eager --host 127.0.0.1 --port {self.port}".split(),
                env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        for _ in range(300):
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])


def trainer(folder: Path, port: int, name: str, *, patience: float = 300, reward=None, **given: Any) -> Any:
    more = {name: given.pop(name) for name in ("peft_config",) if name in given}
    settings = {"weights_dir": str(folder / "weights"), "server_patience": patience}
    args = support.grpo_config(
        folder / name,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=f"http://127.0.0.1:{port}",
        **({"learning_rate": 3e-2, "max_steps": STEPS, "lr_scheduler_type": "constant"} | given),
    )
    return GRPOTrainer(
        model=str(folder / "model"),
        args=args,
        reward_funcs=reward or support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        rollout=RolloutSettings(**settings),
        **more,
    )


def summary(trained: Any) -> dict[str, Any]:
    keys = ("sampling/sampling_logp_difference/mean", "rollout/sync_bytes", "rollout_gap/over_10_percent")
    gaps, sent, tail = zip(*support.logged(trained, *keys), strict=True)
    return {"gap": gaps, "bytes": sent, "tail": tail, "losses": trained.weight_sync.losses}


def different(trained: Any, weights: dict[str, torch.Tensor]) -> list[str]:
    return [n for n, p in trained.model.state_dict().items() if not torch.equal(p, weights[n])]


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.WARNING)
    model = support.model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(folder / "model")
    support.tokenizer().save_pretrained(folder / "model")
    server = Server(folder / "model", folder / "server.log")
    found: dict[str, Any] = {}
    try:
        server.wait()
        run(folder, server, found)
    finally:
        if server.process.poll() is None:
            server.kill()
    (folder / "found.json").write_text(json.dumps(found))


def run(folder: Path, server: Server, found: dict[str, Any]) -> None:
    start = support.weights(support.model(hidden_size=64, num_attention_heads=2, num_key_value_heads=1))
    straight = trainer(folder, server.port, "straight", save_strategy="steps", save_steps=2)
    straight.train()
    weights = support.weights(straight.model)
    moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
    found["straight"] = summary(straight) | {"moved": moved, "model": straight.weight_sync.stream.nbytes}

    resumed = trainer(folder, server.port, "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-2"))
    found["resumed"] = summary(resumed) | {"different": different(resumed, weights)}

    adapted = trainer(folder, server.port, "adapted", peft_config=support.lora())
    adapted.train()
    found["adapted"] = summary(adapted)

    cut = trainer(folder, server.port, "cut", top_p=0.6, top_k=20, min_p=0.02, temperature=0.7)
    cut.train()
    found["cut"] = summary(cut)

    def killing(completions: list[str], **kwargs: Any) -> list[float]:
        if killed.state.global_step == KILLED and not found.get("killed"):
            found["killed"] = True
            server.kill()
            server.start()
        return support.letter_reward(completions)

    killed = trainer(folder, server.port, "killed", reward=killing)
    killed.train()
    found["killed"] = summary(killed) | {"different": different(killed, weights)}

    began = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*command, __file__, str(folder), "rank", str(server.port), str(server.process.pid)],
        check=False,
        timeout=280,
    )
    errors = [(folder / f"rank{rank}").read_text() for rank in range(2)]
    found["gone"] = {"errors": errors, "seconds": time.monotonic() - began}


def rank(folder: Path, port: int, group: int) -> None:
    """One of two ranks whose server dies for good."""
    number = int(os.environ["RANK"])
    stopped = 0.0

    def killing(completions: list[str], **kwargs: Any) -> list[float]:
        nonlocal stopped
        if trained.state.global_step == 1:
            stopped = time.monotonic()
            if number == 0:
                os.killpg(group, signal.SIGKILL)
        return support.letter_reward(completions)

    trained = trainer(folder, port, "gone", patience=3, reward=killing, per_device_train_batch_size=4)
    try:
        trained.train()
        text = "nothing"
    except Exception as error:
        text = f"{time.monotonic() - stopped:.0f} s: {type(error).__name__}: {error}"
    (folder / f"rank{number}").write_text(text)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        rank(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(Path(sys.argv[1]).resolve())
