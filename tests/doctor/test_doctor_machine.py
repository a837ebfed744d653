"""Every known-bad combination is found on the machine that has it, and on no healthy one."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.doctor import combinations, machine, packages
from posttrain.doctor.combinations import CHECKS, judge
from posttrain.doctor.machine import Disk, Gpu, Machine, default_launch, extensions_home, stale_locks
from posttrain.doctor.packages import Requires

H100 = Gpu("NVIDIA H100", 80.0, 79.0, (9, 0), True)
T4 = Gpu("Tesla T4", 16.0, 15.8, (7, 5), False)


def healthy(**changes) -> Machine:
    """A machine with two cards on which nothing is wrong or missing."""
    facts = Machine(
        versions=dict.fromkeys(("trl", "vllm", "bitsandbytes", "flash-attn", "deepspeed"), "1.0")
        | {"python": "3.12.1", "torch": "2.13.0"},
        python_range=">=3.11,<3.14",
        requirements=[Requires("posttrain", "trl", ">=1.16,<1.17", "1.16.0")],
        torch_build="cuda 13.0",
        architectures=["sm_75", "sm_80", "sm_90", "sm_100"],
        driver="580.1",
        driver_gpus=["NVIDIA H100"] * 2,
        gpus=[H100, H100],
        peers=True,
        cores=32,
        threads=32,
        shared_gib=64.0,
        disks=[Disk("runs", "/", 500.0, 900.0)],
        environment={"TOKENIZERS_PARALLELISM": "false"},
        token=True,
    )
    return replace(facts, **changes)


def requires(by, package, needed, installed, optional=False):
    return {"requirements": [Requires(by, package, needed, installed, optional)]}


NOTHING = {"gpus": [], "driver_gpus": [], "driver": None, "peers": None}
CASES = {
    "python_version": ({"versions": {"python": "3.14.0", "torch": "2"} | dict.fromkeys(
        ("vllm", "bitsandbytes", "flash-attn", "deepspeed"), "1")}, "error"),
    "missing_package": (requires("posttrain", "peft", ">=0.21", None), "error"),
    "untested_version": (requires("posttrain", "trl", ">=1.16,<1.17", "1.17.0"), "error"),
    "package_conflict": (requires("trl", "transformers", ">=4.56.2", "4.50"), "warning"),
    "vllm_outside_trl": (requires("trl", "vllm", "<=0.31.0,>=0.22.0", "0.33.0", True), "warning"),
    "broken_import": ({"import_errors": {"trl": "ImportError: cannot import name 'x'"}}, "error"),
    "cpu_torch_on_gpu_machine": ({"gpus": [], "torch_build": "cpu"}, "error"),
    "driver_too_old": ({"gpus": []}, "error"),
    "gpus_hidden": ({"gpus": [], "environment": {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "0"}},
                    "warning"),
    "no_kernels_for_gpu": ({"architectures": ["sm_100", "compute_120"]}, "error"),
    "no_bf16": ({"gpus": [T4]}, "warning"),
    "gpu_in_use": ({"gpus": [replace(H100, free_gib=20.0)]}, "warning"),
    "no_accelerator": ({**NOTHING, "torch_build": "cpu"}, "note"),
    "no_peer_access": ({"peers": False}, "warning"),
    "small_shared_memory": ({"shared_gib": 0.06}, "warning"),
    "too_many_threads": ({"quota": 4.0}, "warning"),
    "disk_low": ({"disks": [Disk("runs", "/", 3.0, 900.0)]}, "warning"),
    "disk_full": ({"disks": [Disk("runs", "/", 0.1, 900.0)]}, "error"),
    "not_writable": ({"disks": [Disk("runs", "/data", 500.0, 900.0, False)]}, "error"),
    "accelerate_default": ({"launch": {"path": "x.yaml", "distributed_type": "DEEPSPEED"}}, "warning"),
    "launch_variables": (
        {"environment": {"ACCELERATE_USE_FSDP": "true", "TOKENIZERS_PARALLELISM": "0"}}, "warning"),
    "cuda_launch_blocking": (
        {"environment": {"CUDA_LAUNCH_BLOCKING": "1", "TOKENIZERS_PARALLELISM": "0"}}, "warning"),
    "nccl_debug": ({"environment": {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "0"}}, "note"),
    "tokenizers_parallelism": ({"environment": {}}, "note"),
    "hub_offline": ({"offline": True}, "note"),
    "no_hub_token": ({"token": False}, "note"),
    "unsloth_installed": ({"versions": healthy().versions | {"unsloth": "2026.8"}}, "warning"),
    "stale_compile_lock": ({"stale_locks": ["/cache/py311_cpu/deepspeed_shm_comm/lock"]}, "warning"),
    "no_vllm": ({"versions": healthy().versions | {"vllm": None}}, "note"),
    "no_bitsandbytes": ({"versions": healthy().versions | {"bitsandbytes": None}}, "note"),
    "no_flash_attention": ({"versions": healthy().versions | {"flash-attn": None}}, "note"),
    "no_deepspeed": ({"versions": healthy().versions | {"deepspeed": None}}, "note"),
}  # fmt: skip


def test_a_healthy_machine_has_no_findings():
    assert judge(healthy()) == []


@pytest.mark.parametrize("name", CASES)
def test_combination(name):
    changes, severity = CASES[name]
    found = judge(healthy(**changes))
    assert [(row.name, row.severity) for row in found] == [(name, severity)]
    assert all((found[0].found, found[0].cause, found[0].advice))


def test_every_finding_has_a_case():
    import inspect
    import re

    named = re.findall(r'Finding\(\s*"(\w+)"', inspect.getsource(combinations))
    assert len(named) >= len(CHECKS)
    assert set(named) <= CASES.keys()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90a"], (9, 0), True),
        (["sm_90"], (10, 0), False),
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_100"], (10, 3), True),
    ],
)
def test_which_cards_a_build_runs_on(built, capability, runs):
    found = judge(healthy(architectures=built, gpus=[replace(H100, capability=capability)] * 2))
    assert ("no_kernels_for_gpu" in {row.name for row in found}) is not runs


def test_a_lock_is_stale_when_it_is_old(tmp_path):
    folder = extensions_home({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    for name in ("py311_cpu/cpu_adam", "py311_cpu/comm"):
        (folder / name).mkdir(parents=True)
        (folder / name / "lock").touch()
    os.utime(folder / "py311_cpu/comm/lock", (0, 0))
    now = (folder / "py311_cpu/cpu_adam/lock").stat().st_mtime + 60
    assert stale_locks(folder, now) == [str(folder / "py311_cpu/comm/lock")]
    assert stale_locks(tmp_path / "none", now) == []
    assert extensions_home({"XDG_CACHE_HOME": "/c"}) == Path("/c/torch_extensions")


def test_a_broken_package_is_told_once_with_its_cause():
    error = "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"
    found = judge(healthy(import_errors={"transformers": error, "trl": error}))
    assert [row.name for row in found] == ["broken_import"]
    assert "built for another torch" in found[0].cause


def test_an_extra_that_is_absent_asks_for_nothing():
    assert judge(healthy(**requires("posttrain", "vllm", ">=0.31,<0.32", None, optional=True))) == []


def test_accelerates_default_file(tmp_path):
    assert default_launch(tmp_path) == {}
    folder = tmp_path / "accelerate"
    folder.mkdir()
    path = folder / "default_config.yaml"
    path.write_text("distributed_type: 'NO'\nmixed_precision: 'no'\nnum_processes: 1\nuse_cpu: false\n")
    assert judge(healthy(launch=default_launch(tmp_path))) == []
    path.write_text("distributed_type: FSDP\nmixed_precision: fp16\nnum_processes: 8\n")
    (found,) = judge(healthy(launch=default_launch(tmp_path)))
    assert all(
        text in found.found for text in ("distributed_type=FSDP", "fp16", "num_processes=8", str(path))
    )
    path.write_text("a: [")
    (found,) = judge(healthy(launch=default_launch(tmp_path)))
    assert (found.name, found.severity) == ("accelerate_default", "error")


def test_the_ranges_are_those_of_the_package():
    rows = {row.package: row for row in packages.requirements() if row.by == "posttrain"}
    assert rows["trl"].met
    assert rows["trl"].needed
    assert rows["vllm"].optional
    assert "pytest" not in rows  # what developers need is not asked of users
    engines = [row for row in packages.requirements() if (row.by, row.package) == ("trl", "vllm")]
    assert len(engines) == 1  # TRL says which vLLM it can talk to


def test_a_checkout_that_is_not_installed_knows_its_ranges(monkeypatch):
    from importlib import metadata

    real = metadata.requires

    def requires_(name):
        if name == "posttrain":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    expected = {(row.package, row.met) for row in packages.requirements() if row.by == "posttrain"}
    monkeypatch.setattr(packages.metadata, "requires", requires_)
    found = {(row.package, row.met) for row in packages.requirements() if row.by == "posttrain"}
    assert found == expected


def test_the_command_shows_this_machine_and_no_token(monkeypatch):
    secret = "hf_" + "s3cret" * 6
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert told["machine"]["token"] is True
    assert told["machine"]["versions"]["trl"]
    assert told["machine"]["environment"]["NCCL_P2P_DISABLE"] == "1"
    assert told["machine"]["import_errors"] == {}
    shown = CliRunner().invoke(app, ["doctor"])
    assert "tested with" in shown.stdout
    assert "token present" in shown.stdout
    assert secret not in done.stdout + shown.stdout
    errors = [row for row in told["findings"] if row["severity"] == "error"]
    assert done.exit_code == shown.exit_code == (1 if errors else 0)


def test_cards_are_read(monkeypatch, tmp_path):
    """What torch and the driver say of two cards; both are stand-ins."""
    import torch

    card = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    stand_in = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "get_device_properties": lambda index: card,
        "mem_get_info": lambda index: (79 * 2**30, 80 * 2**30),
        "can_device_access_peer": lambda one, other: (one, other) != (1, 0),
    }
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nprintf '580.65.06, NVIDIA H100\\n580.65.06, NVIDIA H100\\n'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    found = machine.look()
    assert found.gpus == [H100, H100]
    assert (found.torch_build, found.driver, found.peers) == ("cuda 13.0", "580.65.06", False)
    assert found.driver_gpus == ["NVIDIA H100"] * 2
    assert "no_peer_access" in {row.name for row in judge(found)}
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda index: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    )
    assert "the card is lost" in next(
        row.cause for row in judge(machine.look()) if row.name == "broken_import"
    )


def test_exit_code_one_with_an_error(monkeypatch):
    monkeypatch.setattr(machine, "look", lambda: healthy(gpus=[], torch_build="cpu"))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "error: cpu_torch_on_gpu_machine" in done.stdout


def test_a_torch_that_does_not_import_is_a_finding(monkeypatch):
    real = machine.importlib.import_module

    def broken(name):
        if name in ("torch", "trl"):
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    found = [row for row in judge(machine.look()) if row.name == "broken_import"]
    assert len(found) == 1
    assert "CUDA libraries" in found[0].cause


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    """Of a folder that is not there yet, the one above it counts."""
    locked = tmp_path / "locked"
    locked.mkdir()
    real = machine.os.access
    monkeypatch.setattr(machine.os, "access", lambda path, mode: path != locked and real(path, mode))
    found = machine.look(locked / "runs")
    (said,) = (row for row in judge(found) if row.name == "not_writable")
    assert str(locked) in said.found
    assert "run_dir" in said.advice
