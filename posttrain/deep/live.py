"""Counting the bytes of tensors while they live, real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveTensors(TorchDispatchMode):
    """While it is on, follows the storage of every tensor that an operation returns until it is freed.

    Memory that an operation takes and gives back inside itself is not seen, nor what an allocator keeps.

    Args:
        held: Tensors that are there already (weights); counted from the start.

    Attributes:
        held: Bytes of those.
        current: Bytes now.
        peak: The largest :attr:`current` so far.
        gradients_at_peak: Bytes of it in gradients of parameters that :meth:`watch` was told of.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.current = self.peak = self.gradients = self.gradients_at_peak = 0
        self._seen: Any = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in held:
            self._see(tensor)
        self.held = self.current

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Tell gradients of these parameters apart."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = False
        size = storage.nbytes()
        self.current += size
        weakref.finalize(storage, self._gone, size)
        if self.current > self.peak:
            self.peak, self.gradients_at_peak = self.current, self.gradients

    def _gone(self, size: int) -> None:
        self.current -= size

    def _gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if not self._seen.get(storage, False):
            self._seen[storage] = True
            self.gradients += storage.nbytes()
            weakref.finalize(storage, self._gradient_gone, storage.nbytes())

    def _gradient_gone(self, size: int) -> None:
        self.gradients -= size
