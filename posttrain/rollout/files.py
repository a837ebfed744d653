"""Weights on their way to a vLLM server: files in a folder that both sides see.

The trainer writes what changed as safetensors, about a GiB a file, and a manifest last, under its final name
only when it is complete; then it names the manifest to the server and deletes the folder when the server is
done. The folder may be in shared memory (one machine) or on a file system that the nodes share; no
accelerator is needed on either side.

On the server's side vLLM mixes :class:`WeightFiles` into its workers (``--worker-extension-cls``)::

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --dtype float32 \\
        --logprobs-mode processed_logprobs --worker-extension-cls posttrain.rollout.files.WeightFiles

(``vllm serve MODEL`` is the same, where the package has that command; on a CPU add ``--enforce-eager`` and
set ``VLLM_CPU_KVCACHE_SPACE``.)

``VLLM_SERVER_DEV_MODE`` opens vLLM's endpoints for such calls, without a password: whoever reaches the port
can use them. Only safetensors are read. posttrain has to be installed where the server runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from posttrain.rollout.updates import RolloutError, Update
from posttrain.stored import finished_file

EXTENSION = "posttrain.rollout.files.WeightFiles"
"""What ``--worker-extension-cls`` has to be."""

SHARD_BYTES = 2**30
MANIFEST = "manifest.json"


def write_updates(
    folder: Path,
    updates: Iterable[Update],
    version: str,
    moving: Iterable[str] | None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write updates into a new folder, and return the manifest.

    Args:
        folder: Is made; must not exist.
        updates: What to send.
        version: Name of the weights the server has afterwards.
        moving: With every tensor of the model, the names that later updates may change; else None.
        shard_bytes: Tensors held in memory at a time, about.

    Raises:
        RolloutError: The folder cannot be written.
    """
    rows: list[dict[str, Any]] = []
    shard: dict[str, torch.Tensor] = {}
    files = 0

    def flush() -> None:
        nonlocal files
        if shard:
            save_file(shard, folder / f"{files:05}.safetensors")
            shard.clear()
            files += 1

    try:
        folder.mkdir(parents=True)
        for number, update in enumerate(updates):
            tensors = {f"{number}.values": update.values, f"{number}.index": update.index}
            # a copy: the stream reuses memory, and safetensors wants tensors of their own
            shard |= {key: value.cpu().clone() for key, value in tensors.items() if value is not None}
            rows.append(
                {"name": update.name, "shape": list(update.shape), "part": update.part, "file": files}
                | {"index": update.index is not None}
            )
            if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
                flush()
        flush()
        content = {"version": version, "moving": None if moving is None else sorted(moving), "rows": rows}
        with finished_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise RolloutError(
            f"weights for the vLLM server cannot be written to {folder}: {error}; rollout.weights_dir must "
            "have room for one copy of the model"
        ) from error
    return folder / MANIFEST


def read_updates(manifest: Path) -> tuple[str, list[str] | None, Iterator[Update]]:
    """Return (version, moving, updates) of what :func:`write_updates` wrote; updates are read one at a time.

    Raises:
        RolloutError: There is no such manifest.
    """
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RolloutError(
            f"the server does not see {manifest}: rollout.weights_dir must be one folder for trainer and "
            "server, on a file system that both mount at this path"
        ) from error
    return content["version"], content["moving"], _updates(manifest.parent, content["rows"])


def _updates(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Update]:
    for file in sorted({row["file"] for row in rows}):
        with safe_open(folder / f"{file:05}.safetensors", framework="pt") as tensors:
            for number, row in enumerate(rows):
                if row["file"] == file:
                    index = tensors.get_tensor(f"{number}.index") if row["index"] else None
                    values = tensors.get_tensor(f"{number}.values")
                    yield Update(row["name"], torch.Size(row["shape"]), values, row["part"], index)


class WeightFiles:
    """What every worker of the server can be asked to do, through ``/collective_rpc``."""

    def posttrain_load(self, manifest: str) -> dict[str, str]:
        """Take the updates of a manifest; returns ``{"version": ...}`` or ``{"error": ...}``."""
        from posttrain.rollout.engine import load_updates

        # until all of it has arrived, the weights are of no version
        self._posttrain_version = ""
        try:
            version, moving, updates = read_updates(Path(manifest))
            load_updates(self, updates, moving)
        except Exception as error:  # vLLM would tell the trainer nothing but "internal error"
            return {"error": f"{type(error).__name__}: {error}"}
        self._posttrain_version = version
        return {"version": version}

    def posttrain_version(self) -> dict[str, str]:
        """Return the version of the weights; empty for those the server started with."""
        return {"version": getattr(self, "_posttrain_version", "")}
