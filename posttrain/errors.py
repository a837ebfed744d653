"""Which errors mean that the request was wrong, as opposed to a run that failed."""

from __future__ import annotations

# By name, so that asking does not import torch for an error that was raised without it.
_REQUEST_ERRORS = frozenset({"ConfigError", "DataError", "ModelLoadError", "RunError", "ExportError", "PushError"})


def is_request_error(error: BaseException) -> bool:
    """Whether the message of ``error`` tells the user what to change in the request."""
    return any(cls.__name__ in _REQUEST_ERRORS and cls.__module__.startswith("posttrain.") for cls in type(error).__mro__)
