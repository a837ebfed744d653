"""What is known to go wrong with a machine: combinations that fail, or that quietly change a run.

Each check sees the facts (:class:`posttrain.doctor.machine.Machine`) and yields findings. A package that is
merely absent is a note, and only where it would be of use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from packaging.specifiers import SpecifierSet

from posttrain.doctor.finding import Finding
from posttrain.doctor.machine import Machine

Check = Callable[[Machine], Iterator[Finding]]

DISK_LOW, DISK_FULL = 5.0, 0.5
"""Free GiB below which a disk is a warning, an error."""

SHARED_LOW = 1.0
"""GiB of /dev/shm below which NCCL between cards of one machine fails."""

_HARMLESS_LAUNCH = {
    "mixed_precision": ("no", None),
    "distributed_type": ("NO", None),
    "use_cpu": (False, None),
}
_INSTALL = "install the tested set: pip install -c scripts/constraints.txt -e ."


def python_version(machine: Machine) -> Iterator[Finding]:
    """A Python that posttrain is not for."""
    version = machine.versions.get("python")
    if version and machine.python_range and not SpecifierSet(machine.python_range).contains(version):
        yield Finding(
            "python_version",
            "error",
            f"Python {version}; posttrain is for {machine.python_range}",
            "a virtual environment made with another Python",
            "make a new one with a Python of that range and install posttrain there",
        )


def untested_versions(machine: Machine) -> Iterator[Finding]:
    """Packages outside the ranges that posttrain was tested with."""
    for row in machine.requirements:
        if row.by != "posttrain" or row.met:
            continue
        if row.installed is None:
            yield Finding(
                "missing_package",
                "error",
                f"{row.package} is not installed; posttrain needs {row.needed or 'it'}",
                "posttrain was copied or put on the path without its requirements",
                _INSTALL,
            )
            continue
        why = "its seams in TRL are private there" if row.package == "trl" else "nothing else was tested"
        yield Finding(
            "untested_version",
            "error" if row.package in ("trl", "transformers") else "warning",
            f"{row.package} {row.installed} is installed; posttrain needs {row.needed}",
            f"another package brought it in or it was upgraded by hand; {why}",
            f'pip install "{row.package}{row.needed}"',
        )


def conflicting_packages(machine: Machine) -> Iterator[Finding]:
    """Packages that ask for another version of their neighbour than the one installed."""
    for row in machine.requirements:
        if row.by == "posttrain" or row.met:
            continue
        if row.installed is None:
            found = f"{row.by} needs {row.package}{row.needed}, which is not installed"
        else:
            found = f"{row.by} needs {row.package}{row.needed}; {row.installed} is installed"
        engine = row.package == "vllm"
        yield Finding(
            "vllm_outside_trl" if engine else "package_conflict",
            "warning",
            found,
            "TRL talks to vLLM's internals: outside the range weight sync or sampling fail, or differ quietly"
            if engine
            else "one was upgraded without the other",
            f'pip install "{row.package}{row.needed}", or the version of {row.by} that fits {row.installed}',
        )


def broken_imports(machine: Machine) -> Iterator[Finding]:
    """Packages that are there and do not import."""
    seen: set[str] = set()
    for module, error in machine.import_errors.items():
        if error in seen:
            continue  # the same cause, met once more further out
        seen.add(error)
        cause, advice = "a damaged installation, or versions that do not go together", _INSTALL
        for words, why, what in _IMPORT_CAUSES:
            if re.search(words, error):
                cause, advice = why, what
                break
        yield Finding("broken_import", "error", f"import {module} fails: {error}", cause, advice)


_IMPORT_CAUSES = (
    (
        r"undefined symbol|DLL load failed|operator torchvision::nms does not exist",
        "a compiled package (torchvision, flash-attn, xformers, vllm) was built for another torch",
        "reinstall that package for the torch at hand, or uninstall it: it is optional here",
    ),
    (
        r"lib(cuda|cudart|cudnn|cublas|nccl|nvrtc)[\w-]*\.so",
        "CUDA libraries that torch was built with are not found",
        "reinstall torch with its own libraries; remove foreign CUDA folders from LD_LIBRARY_PATH",
    ),
    (
        r"cannot import name",
        "two packages of different ages",
        _INSTALL,
    ),
    (r"No module named", "the package is missing in this environment", _INSTALL),
    (
        r"CUDA (unknown )?error|no CUDA-capable device|uncorrectable ECC",
        "the card is lost, busy in exclusive mode, or in a bad state",
        "look at nvidia-smi; end the processes on it or restart the machine",
    ),
)


def cpu_torch_on_gpu_machine(machine: Machine) -> Iterator[Finding]:
    """A card that torch was not built for using."""
    if machine.torch_build == "cpu" and machine.driver_gpus:
        yield Finding(
            "cpu_torch_on_gpu_machine",
            "error",
            f"torch {machine.versions.get('torch')} is a CPU build; the driver lists "
            f"{len(machine.driver_gpus)} x {machine.driver_gpus[0]}",
            "torch came from the index of CPU builds; everything would run on the processor, without a word",
            "pip install --force-reinstall torch from the index of your CUDA version (see pytorch.org)",
        )


def invisible_gpus(machine: Machine) -> Iterator[Finding]:
    """Cards that the driver lists and torch does not see."""
    build = machine.torch_build or ""
    if machine.gpus or not machine.driver_gpus or not build.startswith("cuda"):
        return
    visible = machine.environment.get("CUDA_VISIBLE_DEVICES")
    listed = f"{len(machine.driver_gpus)} x {machine.driver_gpus[0]}"
    if visible is not None and visible.strip() in ("", "-1"):
        yield Finding(
            "gpus_hidden",
            "warning",
            f"the driver lists {listed}, and CUDA_VISIBLE_DEVICES={visible!r} hides them",
            "a shell setting or a scheduler that gave this job no card",
            "unset CUDA_VISIBLE_DEVICES, or ask the scheduler for a card",
        )
        return
    yield Finding(
        "driver_too_old",
        "error",
        f"the driver ({machine.driver}) lists {listed}; torch ({build}) can use none",
        "a driver older than the CUDA version torch was built with, or a container started without its cards",
        "update the driver, install a torch built for an older CUDA, or start the container with --gpus all",
    )


def architecture(machine: Machine) -> Iterator[Finding]:
    """A card for which the torch build holds no code."""
    for gpu in machine.gpus:
        if machine.architectures and not _runs_on(machine.architectures, gpu.capability):
            yield Finding(
                "no_kernels_for_gpu",
                "error",
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}; torch was built "
                f"for {', '.join(machine.architectures)}",
                "the card is newer or older than this build",
                "install a torch build whose list holds the card's architecture",
            )
            return


def _runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for one of ``architectures`` runs: the same major version, or newer by way of PTX."""
    for text in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", text)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if built <= capability and (match[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def no_bf16(machine: Machine) -> Iterator[Finding]:
    """Cards without bfloat16, which TRL switches on by itself."""
    old = [gpu for gpu in machine.gpus if not gpu.bf16]
    if old:
        yield Finding(
            "no_bf16",
            "warning",
            f"{old[0].name} (compute capability {old[0].capability[0]}.{old[0].capability[1]}) has no "
            "bfloat16",
            "TRL sets bf16=True unless told otherwise, and that is emulated here, slowly",
            "trainer: {bf16: false, fp16: true} with model: {dtype: float32}",
        )


def busy_gpus(machine: Machine) -> Iterator[Finding]:
    """Cards whose memory others use."""
    for index, gpu in enumerate(machine.gpus):
        used = gpu.memory_gib - gpu.free_gib
        if used > max(2.0, 0.1 * gpu.memory_gib):
            yield Finding(
                "gpu_in_use",
                "warning",
                f"GPU {index} ({gpu.name}): {used:.1f} of {gpu.memory_gib:.1f} GiB are taken",
                "another job, or a process that a killed run left behind (vLLM engines do)",
                "nvidia-smi names the processes; end yours, or choose another card by CUDA_VISIBLE_DEVICES",
            )


def no_accelerator(machine: Machine) -> Iterator[Finding]:
    """No card at all."""
    if machine.torch_build and not machine.gpus and not machine.accelerator and not machine.driver_gpus:
        yield Finding(
            "no_accelerator",
            "note",
            f"no accelerator; {machine.cores} cores",
            "TRL's configurations refuse to start here until use_cpu=True, because they switch bf16 on",
            "posttrain train sets both by itself; in a TRL script of your own: use_cpu=True, bf16=False",
        )


def peer_access(machine: Machine) -> Iterator[Finding]:
    """Cards that cannot reach each other directly, as with most cards for games."""
    if machine.peers is False and not machine.environment.get("NCCL_P2P_DISABLE"):
        yield Finding(
            "no_peer_access",
            "warning",
            f"{len(machine.gpus)} x {machine.gpus[0].name} cannot read each other's memory",
            "cards for workstations and games have no P2P; NCCL may hang or fail where it tries to use it",
            "export NCCL_P2P_DISABLE=1 (and NCCL_IB_DISABLE=1 without InfiniBand); accelerate launch sets "
            "both "
            "for some cards",
        )


def shared_memory(machine: Machine) -> Iterator[Finding]:
    """Too little shared memory for NCCL and data workers."""
    if len(machine.gpus) > 1 and machine.shared_gib is not None and machine.shared_gib < SHARED_LOW:
        yield Finding(
            "small_shared_memory",
            "warning",
            f"/dev/shm holds {machine.shared_gib:.2f} GiB",
            "the default of containers; NCCL and data workers fail there with bus errors",
            "start the container with --shm-size=16g or --ipc=host",
        )


def threads(machine: Machine) -> Iterator[Finding]:
    """More threads than processor time."""
    allowed = min(machine.cores, machine.quota or machine.cores)
    if machine.threads is not None and machine.threads > max(1.0, allowed) + 0.5:
        yield Finding(
            "too_many_threads",
            "warning",
            f"torch would use {machine.threads} threads; this process may use {allowed:g} cores' worth of "
            "time",
            "a container with a quota, or OMP_NUM_THREADS beyond the cores; threads then wait for each "
            "other, "
            "which slows small models down by tens of times",
            f"threads: {max(1, int(allowed))} in the configuration, or export OMP_NUM_THREADS="
            f"{max(1, int(allowed))}",
        )


def disks(machine: Machine) -> Iterator[Finding]:
    """Little room where something will be written."""
    for disk in machine.disks:
        if not disk.writable:
            yield Finding(
                "not_writable",
                "error",
                f"{disk.path}, where {disk.use} would go, cannot be written to by this user",
                "a folder of another user or a disk that is mounted read-only, as in many containers",
                "chown or remount it, or set "
                + {"runs": "run_dir", "model cache": "HF_HOME"}.get(disk.use, "TMPDIR")
                + " to a folder of yours",
            )
        elif disk.free_gib < DISK_LOW:
            yield Finding(
                "disk_full" if disk.free_gib < DISK_FULL else "disk_low",
                "error" if disk.free_gib < DISK_FULL else "warning",
                f"{disk.free_gib:.1f} of {disk.total_gib:.1f} GiB are free for {disk.use} ({disk.path})",
                "checkpoints of earlier runs or downloaded models",
                "delete runs you no longer need (RUN.old, checkpoints), clean the cache (hf cache prune), "
                "set "
                "trainer.save_total_limit, or move run_dir or HF_HOME",
            )


def launch_file(machine: Machine) -> Iterator[Finding]:
    """accelerate's default file, which changes a launch without a word."""
    if not machine.launch:
        return
    path = machine.launch["path"]
    if "damaged" in machine.launch:
        yield Finding(
            "accelerate_default",
            "error",
            f"{path} is not valid YAML: {machine.launch['damaged']}",
            "edited by hand or half written; accelerate launch fails on it",
            "delete it, or write it anew with accelerate config",
        )
        return
    changes = {
        key: machine.launch[key]
        for key, harmless in _HARMLESS_LAUNCH.items()
        if machine.launch.get(key) not in harmless
    }
    processes = machine.launch.get("num_processes")
    if processes not in (None, 1) and (not machine.gpus or processes != len(machine.gpus)):
        changes["num_processes"] = processes
    if changes:
        told = ", ".join(f"{key}={value}" for key, value in changes.items())
        yield Finding(
            "accelerate_default",
            "warning",
            f"accelerate launch without --config_file takes {told} from {path}",
            "accelerate config was run here once, perhaps for another job",
            "name the file you want (accelerate launch --config_file ...), or delete that one",
        )


def launch_variables(machine: Machine) -> Iterator[Finding]:
    """Variables of a launcher that are still set in the shell."""
    names = [
        name
        for name in machine.environment
        if name.startswith("ACCELERATE_") or name in ("WORLD_SIZE", "LOCAL_RANK")
    ]
    if names:
        yield Finding(
            "launch_variables",
            "warning",
            f"set in this shell: {', '.join(f'{name}={machine.environment[name]}' for name in names)}",
            "left by a launcher or a script that was sourced; every run from here takes them for its own",
            f"unset {' '.join(names)}",
        )


def slow_settings(machine: Machine) -> Iterator[Finding]:
    """Settings for debugging that were left on."""
    if machine.environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        yield Finding(
            "cuda_launch_blocking",
            "warning",
            "CUDA_LAUNCH_BLOCKING=1",
            "left from debugging: every kernel waits for the one before",
            "unset CUDA_LAUNCH_BLOCKING",
        )
    if machine.environment.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        yield Finding(
            "nccl_debug",
            "note",
            f"NCCL_DEBUG={machine.environment['NCCL_DEBUG']}",
            "left from debugging: thousands of lines per start",
            "export NCCL_DEBUG=WARN",
        )


def tokenizers(machine: Machine) -> Iterator[Finding]:
    """Tokenizers that use threads beside worker processes."""
    if machine.environment.get("TOKENIZERS_PARALLELISM") is None:
        yield Finding(
            "tokenizers_parallelism",
            "note",
            "TOKENIZERS_PARALLELISM is not set",
            "tokenizers start threads; a process that is forked afterwards (data workers) warns and goes on "
            "with one",
            "export TOKENIZERS_PARALLELISM=false to be rid of the warning; tokenising is no bottleneck here",
        )


def hub(machine: Machine) -> Iterator[Finding]:
    """What the Hub client will and will not do."""
    if machine.offline:
        yield Finding(
            "hub_offline",
            "note",
            "the Hub client is told to stay offline (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)",
            "set in this environment",
            "models and data must lie on this machine; unset it to download. A push fails",
        )
    elif not machine.token:
        yield Finding(
            "no_hub_token",
            "note",
            "no Hub token on this machine",
            "gated models (Llama, Gemma) and uploads need one",
            "hf auth login, or export HF_TOKEN; public models work without",
        )


def compile_locks(machine: Machine) -> Iterator[Finding]:
    """Locks on which every later run would wait, without a word."""
    if machine.stale_locks:
        yield Finding(
            "stale_compile_lock",
            "warning",
            f"{len(machine.stale_locks)} old lock(s) of a compilation: {', '.join(machine.stale_locks[:3])}",
            "a process was killed while DeepSpeed or torch compiled an extension; the next one that needs it "
            "waits for ever",
            "delete the lock, or the folder it is in, when nothing compiles there",
        )


def rivals(machine: Machine) -> Iterator[Finding]:
    """Packages that change TRL or transformers when they are imported."""
    if machine.versions.get("unsloth"):
        yield Finding(
            "unsloth_installed",
            "warning",
            f"unsloth {machine.versions['unsloth']} shares this environment",
            "importing it replaces parts of TRL and transformers, and its requirements hold TRL back",
            "a virtual environment of its own for each",
        )


def worth_installing(machine: Machine) -> Iterator[Finding]:
    """Optional packages that would pay on these cards."""
    if not machine.gpus:
        return
    if not machine.versions.get("vllm"):
        yield Finding(
            "no_vllm",
            "note",
            "vLLM is not installed",
            "reinforcement learning then generates with transformers, several times slower",
            'pip install "posttrain[vllm]" and trainer: {use_vllm: true}',
        )
    if not machine.versions.get("bitsandbytes"):
        yield Finding(
            "no_bitsandbytes",
            "note",
            "bitsandbytes is not installed",
            "8-bit optimisers (trainer.optim: adamw_8bit, paged_adamw_8bit) and 4-bit bases need it",
            "pip install bitsandbytes, where you want them",
        )
    if not machine.versions.get("flash-attn"):
        yield Finding(
            "no_flash_attention",
            "note",
            "flash-attn is not installed",
            "model.attn_implementation: flash_attention_2 fails; padding_free and packing without leaks "
            "need it",
            "sdpa, the default, is nearly as fast; pip install flash-attn for the rest",
        )
    if len(machine.gpus) > 1 and not machine.versions.get("deepspeed"):
        yield Finding(
            "no_deepspeed",
            "note",
            "DeepSpeed is not installed",
            "ZeRO needs it; FSDP2 and DDP do not",
            'pip install "posttrain[deepspeed]", where you want it',
        )


CHECKS: tuple[Check, ...] = (
    python_version,
    untested_versions,
    conflicting_packages,
    broken_imports,
    cpu_torch_on_gpu_machine,
    invisible_gpus,
    architecture,
    no_bf16,
    busy_gpus,
    no_accelerator,
    peer_access,
    shared_memory,
    threads,
    disks,
    launch_file,
    launch_variables,
    slow_settings,
    tokenizers,
    hub,
    compile_locks,
    rivals,
    worth_installing,
)


def judge(machine: Machine) -> list[Finding]:
    """Return everything that is wrong with a machine, or worth knowing about it."""
    return [finding for check in CHECKS for finding in check(machine)]
