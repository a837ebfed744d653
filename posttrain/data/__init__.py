"""Data: generated tasks, local files and the Hub, checked against the contract of the training.

``load_data`` turns the ``data`` section into rows, ``render`` puts their prompts into the form of a
tokenizer, ``apply_length_policy`` counts them and refuses or leaves out those that are too long.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# loaded on first use: the generator process needs this package but not the datasets library
_LAZY = {
    "DataError": "errors",
    "LengthReport": "length",
    "LoadedData": "load",
    "apply_length_policy": "length",
    "count_tokens": "length",
    "load_data": "load",
    "load_warm_start": "load",
    "render": "prompts",
}

__all__ = [
    "DataError",
    "LengthReport",
    "LoadedData",
    "apply_length_policy",
    "count_tokens",
    "load_data",
    "load_warm_start",
    "render",
]

if TYPE_CHECKING:
    from posttrain.data.errors import DataError
    from posttrain.data.length import LengthReport, apply_length_policy, count_tokens
    from posttrain.data.load import LoadedData, load_data, load_warm_start
    from posttrain.data.prompts import render


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
