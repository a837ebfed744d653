"""The manifest of a run: what one needs to know to repeat it. No secrets: the environment is not written "
"down."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import posttrain
from posttrain._lazy import torch

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "reasoning-gym",
    "math-verify",
    "vllm",
    "deepspeed",
)

REDACTED = "***"

# keys of the Hub, GitHub and OpenAI-like services, wherever they stand
_KEY = re.compile(r"\b(hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,})\b")
_NAME = r"[\w.-]*(?:token|api[_-]?key|secret|password|passwd|credential)s?"
_SECRET_NAME = re.compile(rf"^-*{_NAME}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"^(-*{_NAME}=)(.+)$", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"(\w+://)[^/@\s]+@")
# texts like "<pad>", and numbers of tokens
_HARMLESS = re.compile(r"(^|[._-])(pad|eos|bos|unk|mask|stop|special|image)_token$|tokens$", re.IGNORECASE)


def build_manifest(
    config: Mapping[str, Any],
    *,
    data: Mapping[str, Any] | None = None,
    seeds: Mapping[str, int] | None = None,
    command: Sequence[str] | str | None = None,
) -> dict[str, Any]:
    """Return what is needed to repeat a run, as plain JSON values.

    Args:
        config: The resolved configuration.
        data: What describes the data: source, fingerprint, rows.
        seeds: Every seed of the run, by name.
        command: The command to repeat, as arguments or in shell syntax; that of this process when None.

    Returns:
        ``time`` (UTC, ISO 8601), ``command``, ``launch`` (processes), ``versions`` (installed packages only),
        ``commit`` (of the source checkout, or None), ``hardware``, ``seeds``, ``data``, ``config``. Values
        that look like tokens or passwords are replaced by ``***``.
    """
    if command is None:
        command = repeat_command()
    arguments = shlex.split(command) if isinstance(command, str) else command
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(_redact_arguments(arguments)),
        "launch": {"processes": int(os.environ.get("WORLD_SIZE", "1"))},
        "versions": versions(),
        "commit": source_commit(),
        "hardware": hardware(),
        "seeds": dict(seeds or {}),
        "data": redact(dict(data or {})),
        "config": redact(dict(config)),
    }


def repeat_command() -> list[str]:
    """Return the command that started this process, launcher included where its shape is known.

    ``python -m package`` is written so again, an entry point by its name, and under ``accelerate launch`` or
    ``torchrun`` the number of processes is stated (the launcher's other settings are not visible from here).
    """
    arguments = list(sys.argv)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        program = ["-m", spec.name.removesuffix(".__main__")]
    elif arguments and Path(arguments[0]).suffix == ".py":
        program = [arguments[0]]
    else:
        return [Path(arguments[0]).name if arguments else "posttrain", *arguments[1:]]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        return ["accelerate", "launch", "--num_processes", str(processes), *program, *arguments[1:]]
    return ["python", *program, *arguments[1:]]


def versions() -> dict[str, str]:
    """Return the version of posttrain, Python and each installed package of :data:`PACKAGES`."""
    found = {"posttrain": posttrain.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def source_commit(folder: Path | None = None) -> dict[str, Any] | None:
    """Return ``commit`` and ``dirty`` (tracked files changed) of the checkout posttrain runs from, or None.

    Args:
        folder: Look here instead; it must be the top of a checkout, so that a package installed somewhere
            below another project's checkout does not report that project's commit.
    """
    folder = folder or Path(posttrain.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {
            "commit": commit,
            "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None  # no git on this machine, no commit yet, or a checkout owned by another user


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Return ``system``, ``cpu``, ``cores`` (usable by this process), ``memory_gib`` and ``gpus``."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory_gib(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            }
            for index in range(torch.cuda.device_count())
        ],
    }


def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Return the machine's memory, or None where it cannot be asked."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


# ---- secrets ----------------------------------------------------------------------------------------------


def redact(value: Any) -> Any:
    """Return ``value`` as plain JSON with secrets replaced by ``***``, by the name or the shape of a "
    "value."""
    if isinstance(value, Mapping):
        return {
            str(key): REDACTED if item and isinstance(item, str) and _is_secret(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _redact_text(str(value))


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.match(name)) and not _HARMLESS.search(name)


def _redact_text(text: str) -> str:
    return _URL.sub(rf"\1{REDACTED}@", _KEY.sub(REDACTED, text))


def _redact_arguments(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for argument in arguments:
        previous = kept[-1] if kept else ""
        assigned = _ASSIGNED.match(argument)
        if previous.startswith("-") and _is_secret(previous) and not argument.startswith("-"):
            kept.append(REDACTED)
        elif assigned and _is_secret(assigned.group(1)[:-1]):
            kept.append(assigned.group(1) + REDACTED)
        else:
            kept.append(_redact_text(argument))
    return kept
