"""The tensors of a checkpoint, read from its safetensors shards piece by piece.

Nothing is built from them: no model class, no copy of the whole. A block of a tensor is all that is in
    memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from posttrain.models.load import ADAPTER_CONFIG, ModelLoadError, download, refuse_delta
from posttrain.stored import stored_json

BLOCK = 1 << 20
"""Elements read at a time: 4 MiB once they are fp32, which the cache holds; larger blocks are slower."""

INDEX = "model.safetensors.index.json"
"""Name of the file that says which shard holds a tensor."""

_HEAD = re.compile(r"(.*\.)?lm_head\.weight|embed_out\.weight|output\.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that hold trained weights, by their name in a safetensors header."""


class Stored(NamedTuple):
    """How a tensor is stored.

    Attributes:
        file: The shard.
        shape: Its shape; () for a scalar.
        dtype: Name in the safetensors header, such as BF16.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The floating-point type, or None for tensors that hold no trained weights (integers, masks)."""
        return FLOATS.get(self.dtype)


class Checkpoint:
    """A folder (or Hub repository) of full weights in safetensors; use as a context manager to read.

    Args:
        path: Folder, or Hub id.
        revision: Commit or branch of a Hub id.
        beside: Of a Hub id, also fetch what lies beside the weights, such as the tokenizer.

    Attributes:
        folder: Where it lies on this machine.
        tensors: How each tensor is stored, by name.
        config: Content of its config.json, {} without one.

    Raises:
        ModelLoadError: There is no such folder, it holds an adapter, pickles or quantised weights, or a shard
            is missing or damaged.
    """

    def __init__(self, path: str | Path, *, revision: str | None = None, beside: bool = False) -> None:
        self.path = str(path)
        self.folder = folder = _folder(self.path, revision, beside)
        if (folder / ADAPTER_CONFIG).is_file():
            raise ModelLoadError(
                f"{self.path!r} is an adapter, and its matrices say nothing about which weights of the model "
                f"change. Merge it first: posttrain export {self.path} --format merged --to FOLDER"
            )
        refuse_delta(folder)
        config = folder / "config.json"
        self.config: dict[str, Any] = stored_json(config) if config.is_file() else {}
        if "quantization_config" in self.config:
            raise ModelLoadError(
                f"{self.path!r} is quantised: equal codes would show the quantiser, not the training. "
                f"Load it, call model.dequantize(), save it with save_pretrained, and compare that"
            )
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()
        self.tensors = _headers(folder)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    def blocks(self, name: str, size: int = BLOCK) -> Iterator[torch.Tensor]:
        """Yield a tensor as blocks of whole rows, in order, each of about ``size`` elements."""
        stored = self.tensors[name]
        if len(stored.shape) == 0:
            yield self.tensor(name).reshape(1)
            return
        rows = stored.shape[0]
        step = max(1, size * rows // max(stored.elements, 1))
        view = self._file(stored.file).get_slice(name)
        for start in range(0, rows, step):
            yield view[start : min(start + step, rows)]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor as it is stored."""
        value: torch.Tensor = self._file(self.tensors[name].file).get_tensor(name)
        return value

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path]


def tied_heads(sides: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the output heads that are the input embedding, stored a second time on at least one side.

    Returns:
        Name of the head: name of the embedding.
    """
    names = dict.fromkeys(name for side in sides for name in side.tensors if _HEAD.fullmatch(name))
    found = {name: [_embedding_of(side, name) for side in sides] for name in names}
    return {
        name: embeddings[0] for name, embeddings in found.items() if embeddings[0] and len({*embeddings}) == 1
    }


def _embedding_of(side: Checkpoint, head: str) -> str | None:
    """Return the embedding that the head of this side is a copy of, also when it is not stored because of
    that."""
    embeddings = [name for name in side.tensors if name.endswith(_EMBEDDINGS)]
    said = side.config.get(
        "tie_word_embeddings", side.config.get("text_config", {}).get("tie_word_embeddings")
    )
    if len(embeddings) != 1 or said is False:
        return None
    if head not in side.tensors:
        return embeddings[0]
    a, b = side.tensors[head], side.tensors[embeddings[0]]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return None
    if said is True:
        return embeddings[0]
    # not every configuration writes its default down: then the numbers decide
    pairs = zip(side.blocks(head), side.blocks(embeddings[0]), strict=True)
    return embeddings[0] if all(torch.equal(one, two) for one, two in pairs) else None


def _folder(path: str, revision: str | None, beside: bool) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelLoadError(f"{path!r} is a file: give the folder of the checkpoint")
    try:
        # the card tells the licence
        needed = ["*.safetensors", INDEX, "config.json", "README.md", ADAPTER_CONFIG]
        return download(path, revision, only=None if beside else needed)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"there is no folder {path!r}, and as a Hub id it cannot be fetched: give the folder of a "
            f"checkpoint or 'user/name' [{type(error).__name__}: {' '.join(str(error).split())[:200]}]"
        ) from error


def _headers(folder: Path) -> dict[str, Stored]:
    files = _files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, not a mapping
                    view = shard.get_slice(name)
                    if name in tensors:
                        raise ModelLoadError(
                            f"tensor {name} is in {tensors[name].file.name} and in {file.name} of "
                            f"{folder}: remove the file that does not belong there"
                        )
                    tensors[name] = Stored(file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file} cannot be read, it is missing, damaged or cut short: copy or download it again "
                f"[{error}]"
            ) from error
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        # other files of weights may lie beside the shards, such as consolidated copies
        names = stored_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ModelLoadError(f"{index} does not say in which files the weights lie: copy it again")
        return sorted({folder / name for name in names.values()})
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise ModelLoadError(
            f"{str(folder)!r} holds no safetensors weights (found: {found}). Pickled weights are not "
            f"read: load them and call save_pretrained"
        )
    return files
