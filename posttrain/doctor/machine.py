"""What a machine has: packages, devices, memory, disks, and settings that change a launch without a word.

:func:`look` never fails: what cannot be read is left out, and a package that does not import is a fact like
the others. What follows from the facts is in :mod:`posttrain.doctor.combinations`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

import posttrain
from posttrain.doctor.packages import Requires, python_range, requirements, versions
from posttrain.run.manifest import cpu_model, memory_gib

IMPORTED = ("transformers", "trl", "peft", "posttrain.rl.trainer", "posttrain.preference.trainer")
"""What is imported to see whether it can be."""

STALE_SECONDS = 1800.0
"""Age from which the lock of a compilation is one that was left: none takes half an hour."""

# what is shown of the environment; nothing here holds secrets
VARIABLES = (
    "ACCELERATE_*",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    "NCCL_*",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
    "WANDB_MODE",
    "WORLD_SIZE",
)


@dataclass(frozen=True)
class Gpu:
    """A graphics card as torch sees it; sizes in GiB."""

    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True)
class Disk:
    """Where something is written; sizes in GiB. ``path`` is the nearest folder that is there."""

    use: str
    path: str
    free_gib: float
    total_gib: float
    writable: bool = True


@dataclass
class Machine:
    """Facts about a machine.

    Attributes:
        executable: The Python that runs.
        package: Folder posttrain is imported from.
        versions: Installed version of each package, None for one that is absent.
        python_range: Python versions posttrain is for.
        requirements: What packages ask of each other.
        import_errors: Module to error, of those of :data:`IMPORTED` that do not import.
        torch_build: ``cuda 13.0``, ``rocm 6.4`` or ``cpu``; None when torch does not import.
        architectures: GPU architectures torch was built for, such as ``sm_90``.
        driver: Version of the NVIDIA driver, or None.
        driver_gpus: Cards the driver lists.
        gpus: Cards torch can use.
        accelerator: Another accelerator (``mps``, ``xpu``), or None.
        peers: Whether every pair of cards reaches each other directly; None with fewer than two.
        processor: Its name.
        cores: Cores this process may use.
        quota: Cores' worth of time a container allows, or None.
        threads: Threads torch would use, or None.
        memory_gib: Memory of the machine.
        memory_limit_gib: What a container allows, or None.
        shared_gib: Size of /dev/shm, or None.
        open_files: How many files a process may have open.
        disks: Space where runs and caches lie.
        environment: Variables that change a run.
        offline: Whether the Hub client is told to stay offline.
        token: Whether a Hub token is there. It is never shown.
        launch: accelerate's default configuration, when there is one; ``path`` among the keys.
        stale_locks: Locks of compilations of torch extensions that are older than :data:`STALE_SECONDS`.
    """

    executable: str = ""
    package: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    python_range: str = ""
    requirements: list[Requires] = field(default_factory=list)
    import_errors: dict[str, str] = field(default_factory=dict)
    torch_build: str | None = None
    architectures: list[str] = field(default_factory=list)
    driver: str | None = None
    driver_gpus: list[str] = field(default_factory=list)
    gpus: list[Gpu] = field(default_factory=list)
    accelerator: str | None = None
    peers: bool | None = None
    processor: str = ""
    cores: int = 1
    quota: float | None = None
    threads: int | None = None
    memory_gib: float | None = None
    memory_limit_gib: float | None = None
    shared_gib: float | None = None
    open_files: int | None = None
    disks: list[Disk] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    offline: bool = False
    token: bool = False
    launch: dict[str, Any] = field(default_factory=dict)
    stale_locks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {**asdict(self), "requirements": [asdict(row) | {"met": row.met} for row in self.requirements]}


def look(folder: Path | None = None) -> Machine:
    """Collect the facts.

    Args:
        folder: Where runs are to be written; ``runs`` in the current folder when None.
    """
    environment = _environment(os.environ)
    machine = Machine(
        executable=sys.executable,
        package=str(Path(posttrain.__file__).parent),
        versions=versions(),
        python_range=python_range(),
        requirements=requirements(),
        processor=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota=_cpu_quota(),
        memory_gib=memory_gib(),
        memory_limit_gib=_memory_limit(),
        shared_gib=_size_of("/dev/shm"),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disks=_disks(folder or Path("runs")),
        environment=environment,
        launch=default_launch(hub_home(os.environ)),
        stale_locks=stale_locks(extensions_home(os.environ), time.time()),
    )
    machine.driver, machine.driver_gpus = _driver()
    _ask_torch(machine)
    for name in IMPORTED:
        error = _import_error(name)
        if error is not None:
            machine.import_errors[name] = error
    _ask_hub(machine)
    return machine


def extensions_home(environment: Mapping[str, str]) -> Path:
    """Return the folder in which torch compiles extensions, DeepSpeed's among them."""
    set_here = environment.get("TORCH_EXTENSIONS_DIR")
    if set_here:
        return Path(set_here)
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def stale_locks(folder: Path, now: float) -> list[str]:
    """Return the locks of compilations that nobody can still be at, ``now`` in seconds since the epoch."""
    found = []
    for pattern in ("*/lock", "*/*/lock"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # it has just gone
                if now - path.stat().st_mtime > STALE_SECONDS:
                    found.append(str(path))
    return sorted(found)


def hub_home(environment: Mapping[str, str]) -> Path:
    """Return the folder in which the Hub client and accelerate keep their files."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or f"{cache}/huggingface").expanduser()


def default_launch(home: Path) -> dict[str, Any]:
    """Return what ``accelerate launch`` does when it is not told: its file in the user's cache, or {}."""
    for name in ("default_config.yaml", "default_config.yml", "default_config.json"):
        path = home / "accelerate" / name
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            return {"path": str(path), "damaged": str(error).splitlines()[0]}
        return {"path": str(path), **(content if isinstance(content, dict) else {})}
    return {}


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    return None


def _ask_torch(machine: Machine) -> None:
    error = _import_error("torch")
    if error is not None:
        machine.import_errors["torch"] = error
        return
    import torch

    cuda, rocm = torch.version.cuda, torch.version.hip
    machine.torch_build = f"cuda {cuda}" if cuda else f"rocm {rocm}" if rocm else "cpu"
    machine.threads = torch.get_num_threads()
    try:
        machine.architectures = list(torch.cuda.get_arch_list()) if cuda else []
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            machine.gpus = [_gpu(index) for index in range(count)]
            pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
            machine.peers = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None
        elif torch.accelerator.is_available():
            machine.accelerator = str(torch.accelerator.current_accelerator())
    except RuntimeError as failure:  # a card that is lost or in a bad state
        machine.import_errors["torch.cuda"] = str(failure).splitlines()[0]


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    bf16 = capability >= (8, 0) or torch.version.hip is not None
    return Gpu(properties.name, round(total / 2**30, 1), round(free / 2**30, 1), capability, bf16)


def _ask_hub(machine: Machine) -> None:
    try:
        from huggingface_hub import constants, get_token

        machine.offline = bool(constants.HF_HUB_OFFLINE)
        machine.token = bool(get_token())
    except Exception as error:
        machine.import_errors["huggingface_hub"] = f"{type(error).__name__}: {error}"


def _driver() -> tuple[str | None, list[str]]:
    """Return the version of the NVIDIA driver and the cards it lists, which torch need not be able to use."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, []
    try:
        done = subprocess.run(
            [program, "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None, []
    rows = [line.split(",", 1) for line in done.stdout.splitlines() if "," in line]
    return (rows[0][0].strip() if rows else None), [row[1].strip() for row in rows]


def _cpu_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _memory_limit() -> float | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if text == "max" else round(int(text) / 2**30, 1)
    except (OSError, ValueError):
        return None


def _size_of(path: str) -> float | None:
    try:
        return round(shutil.disk_usage(path).total / 2**30, 2)
    except OSError:
        return None


def _disks(folder: Path) -> list[Disk]:
    cache = Path(os.environ.get("HF_HUB_CACHE") or hub_home(os.environ) / "hub").expanduser()
    places = {"runs": folder, "model cache": cache, "temporary files": Path(os.environ.get("TMPDIR", "/tmp"))}
    found = []
    for use, path in places.items():
        there = path.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        try:
            usage = shutil.disk_usage(there)
        except OSError:
            continue
        found.append(
            Disk(
                use,
                str(there),
                round(usage.free / 2**30, 1),
                round(usage.total / 2**30, 1),
                os.access(there, os.W_OK | os.X_OK),
            )
        )
    return found


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    exact = {name for name in VARIABLES if not name.endswith("*")}
    starts = tuple(name[:-1] for name in VARIABLES if name.endswith("*"))
    return {
        name: value for name, value in sorted(environment.items()) if name in exact or name.startswith(starts)
    }
