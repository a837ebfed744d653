"""Whether a checkpoint is as it was written; nothing here imports torch.

A checkpoint holds the list of its files with their sizes, so that one which lost a file, or half of one on a
full disk or in a copy, is refused instead of gone on from: transformers starts a missing optimiser anew
without a word. Changed bytes of the same number are looked for where loading failed.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from posttrain.checkpointing.folders import checkpoint_folders
from posttrain.stored import StoredFileError, stored_json

FILES = "posttrain_files.json"
"""Name of the list: sizes in bytes by the path in the checkpoint."""
_STATE = "trainer_state.json"


def list_files(folder: Path) -> None:
    """Write the list of the files below ``folder`` that hold weights or state; all are finished.

    Raises:
        OSError: It cannot be written.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_read(path))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _is_read(path: Path) -> bool:
    # cards, tokenizers and configurations may be edited: a resume does not read them from here
    return path.suffix not in (".md", ".json", ".jinja", ".txt", ".py") and path.name != "training_args.bin"


def damage(folder: Path, *, deep: bool = False) -> str | None:
    """Return what is wrong with a checkpoint, one sentence that begins with a file's name, or None.

    Args:
        folder: A checkpoint; of one without a list (of plain TRL, say) only what is there is looked at.
        deep: Read the files of torch in full and compare their checksums.
    """
    try:
        if not isinstance(stored_json(folder / _STATE).get("global_step"), int):
            return f"{_STATE} does not say at which step it was written"
        if (folder / FILES).exists():
            for name, size in stored_json(folder / FILES).items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is {'a folder' if path.is_dir() else 'missing'}"
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes, {size} were written"
    except StoredFileError as error:
        return str(error).removeprefix(f"{folder}/").partition(". Restore")[0]
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    for path in sorted(folder.iterdir()):
        if path.is_file() and (words := _unreadable(path, deep)):
            return f"{path.name} cannot be read: {words}"
    return None


def _unreadable(path: Path, deep: bool) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                return None
        if path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip() if deep else None
            return f"the checksum of its part {broken} is another one" if broken else None
    except (OSError, ValueError, NotImplementedError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error) or "it ends too early"
    return None


def refusal(folder: Path, found: str) -> str:
    """Return the message about a damaged checkpoint: what was found, and the ways on."""
    steps = checkpoint_folders(folder.parent)
    earlier = [path.name for path in steps.values() if path != folder and damage(path) is None]
    then = f"goes on from {earlier[-1]}" if earlier else "starts at step 0, there is no other whole one"
    return (
        f"{folder} is damaged, so training cannot go on from it: {found}. Restore that file from a copy, or "
        f"move the folder {folder.name} away: the resume then {then}"
    )
