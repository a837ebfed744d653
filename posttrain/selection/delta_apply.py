"""Putting deltas on a base and taking them off again, bit for bit.

A delta may lie in a folder with the configuration and the tokenizer of the trained model; those then take the
place of the base's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from posttrain.evaluation.checkpoint import INDEX, Checkpoint, Stored
from posttrain.models.load import DELTA_FILE
from posttrain.selection.delta_base import (
    base_of,
    check_tensors,
    config_dtype,
    read_as,
    to_type,
    verify,
)
from posttrain.selection.delta_file import DeltaError, DeltaFile, Header, save_tensors
from posttrain.selection.plan import tensor_hash

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}
# belong to what the folder was, not to what it becomes
_NOT_COPIED = {
    INDEX,
    "README.md",
    ".gitattributes",
    "posttrain_export.json",
    "trainer_state.json",
    DELTA_FILE,
}


def apply_delta(
    delta: str | Path, out: str | Path, *, base: str | Path | None = None, revision: str | None = None
) -> Header:
    """Write the trained checkpoint: the base's shards with the delta on them, and what lies beside them.

    Args:
        delta: File, or folder that holds one.
        out: Folder to write; new or empty.
        base: Where the base lies; the recorded address when None.
        revision: Commit or branch of ``base``; the recorded one when both are None.

    Raises:
        DeltaError: The base is not the one the delta was made of (names, shapes, hashes), the delta is
            damaged, or ``out`` is in use. Nothing is left in ``out``.
        ModelLoadError: The base cannot be read.
        OSError: The checkpoint cannot be written; nothing is left of it.
    """
    with DeltaFile(delta) as file, base_of([file], base, revision, beside=True) as start:
        check_tensors(file, start, list(file.header.tensors))
        _rewrite(start, Path(out), file, lambda name, values: _put_on(file, name, values), over=file.folder)
        return file.header


def remove_delta(
    delta: str | Path, tuned: str | Path, out: str | Path, *, base: str | Path | None = None
) -> Header:
    """Write the base again, from a checkpoint that a delta was applied to.

    The weights of the base come back, in the type of the trained checkpoint; what lies beside them is that of
    ``tuned``.

    Args:
        delta: File, or folder that holds one.
        tuned: The checkpoint with the delta on it.
        out: Folder to write; new or empty.
        base: Where the base lies. Only needed when the file holds no old values; the recorded address when
            None.

    Raises:
        DeltaError: ``tuned`` is not what the delta leads to, or as :func:`apply_delta`.
        ModelLoadError: As :func:`apply_delta`.
        OSError: As :func:`apply_delta`.
    """
    with ExitStack() as stack:
        file = stack.enter_context(DeltaFile(delta))
        source = stack.enter_context(Checkpoint(tuned, beside=True))
        start = None if file.header.old_values else stack.enter_context(base_of([file], base))
        check_tensors(file, source, list(file.header.tensors))
        if start is not None:
            check_tensors(file, start, list(file.header.tensors))
        _rewrite(source, Path(out), file, lambda name, values: _take_off(file, start, name, values))
        return file.header


def load_delta(
    delta: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load base and delta into a plain transformers model, on the CPU, in evaluation mode.

    Args:
        delta: File, or folder that holds one.
        base: Where the base lies; the recorded address when None.
        revision: Commit or branch of ``base``; the recorded one when both are None.
        dtype: Type of the weights; ``auto``: as trained.
        trust_remote_code: Run Python shipped with the base.
        settings: Further arguments of ``from_pretrained``, such as ``attn_implementation``.

    Raises:
        DeltaError: As :func:`apply_delta`; also weights that find no place in the model.
        ModelLoadError: The base cannot be read.
    """
    with DeltaFile(delta) as file, base_of([file], base, revision) as start:
        header = file.header
        check_tensors(file, start, list(header.tensors))
        state = {
            name: _put_on(file, header.tied.get(name, name), _cast(start.tensor(name), stored, header, name))
            for name, stored in start.tensors.items()
        }
        own = file.folder if file.folder and (file.folder / "config.json").is_file() else start.folder
        config = AutoConfig.from_pretrained(own, trust_remote_code=trust_remote_code)
        if header.dtype is not None:
            config.dtype = getattr(torch, header.dtype)
        with torch.device("meta"):  # the class is all that is wanted
            cls = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        model, found = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **settings
        )
        lost = sorted([*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]], key=str)
        if lost:
            raise DeltaError(f"{start.path!r} does not load as a {cls.__name__}: {lost[:3]} have no match")
        if (own / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(own)
        model.config._name_or_path = ""  # these weights are not what lies at the base's address
        return model.eval()


def _put_on(file: DeltaFile, name: str, values: torch.Tensor) -> torch.Tensor:
    if name not in file.header.tensors:
        return values
    about = file.header.tensors[name]
    verify(values, about.before, name, file, "base")
    entry = file.entry(name)
    return _scatter(values, entry.positions, entry.values, about.after, name, file)


def _take_off(file: DeltaFile, base: Checkpoint | None, name: str, values: torch.Tensor) -> torch.Tensor:
    if name not in file.header.tensors:
        return values
    about = file.header.tensors[name]
    verify(values, about.after, name, file, "trained checkpoint")
    entry = file.entry(name)
    old = entry.old if base is None else read_as(base, name, about.dtype).reshape(-1)[entry.positions]
    assert old is not None
    return _scatter(values, entry.positions, old, about.before, name, file)


def _scatter(
    values: torch.Tensor, where: torch.Tensor, new: torch.Tensor, expected: str, name: str, file: DeltaFile
) -> torch.Tensor:
    result = values.clone().reshape(-1)
    if new.dtype != result.dtype:
        raise DeltaError(f"{file.path} is damaged at {name}: values of {new.dtype} for {result.dtype}")
    result[where] = new
    result = result.view(values.shape)
    if tensor_hash(result) != expected:
        raise DeltaError(
            f"{name} does not come out as it was when {file.path} was made: the file is damaged, "
            "make it again"
        )
    return result


def _cast(values: torch.Tensor, stored: Stored, header: Header, name: str) -> torch.Tensor:
    """Return a tensor in the type it has after training."""
    name = header.tied.get(name, name)
    touched = header.tensors.get(name)
    wanted = header.cast.get(name, stored.dtype) if touched is None else touched.dtype
    return to_type(values, stored.dtype, wanted, name)


def _rewrite(
    source: Checkpoint,
    out: Path,
    file: DeltaFile,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    over: Path | None = None,
) -> None:
    """Write a checkpoint shard by shard under another name, with the files beside it and those of ``over``,
    then rename the folder."""
    header = file.header
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DeltaError(f"{out} is in use: give a new or empty folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards: dict[Path, list[str]] = {}
        for name, stored in source.tensors.items():
            shards.setdefault(stored.file, []).append(name)
        size = 0
        for shard, names in shards.items():
            tensors = {}
            for name in names:
                values = _cast(source.tensor(name), source.tensors[name], header, name)
                tensors[name] = change(header.tied.get(name, name), values)
                size += tensors[name].nbytes
            save_tensors(tensors, partial / shard.name, {"format": "pt"})
        _copy_beside(source, partial, header, size)
        for path in files_beside(over) if over is not None else ():
            shutil.copyfile(path, partial / path.name)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def files_beside(folder: Path) -> list[Path]:
    """Return what belongs to a model besides its weights: configuration, tokenizer, code."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _NOT_COPIED
    ]


def _copy_beside(source: Checkpoint, target: Path, header: Header, size: int) -> None:
    for path in files_beside(source.folder):
        if path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    index = source.folder / INDEX
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"] = {**content.get("metadata", {}), "total_size": size}
        (target / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config = source.folder / "config.json"
    if not config.is_file():
        return
    if header.dtype is None or config_dtype(source) == header.dtype:
        shutil.copyfile(config, target / "config.json")
        return
    content = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    text = json.dumps({**content, "dtype": header.dtype}, indent=2, sort_keys=True)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")
