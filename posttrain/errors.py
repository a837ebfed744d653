"""Which errors mean that the request was wrong, as opposed to a run that failed."""

from __future__ import annotations

# By name, so that asking does not import torch for an error that was raised without it.
_REQUEST_ERRORS = frozenset(
    {
        "ConfigError",
        "DataError",
        "DeltaError",
        "ExportRequestError",
        "MergeError",
        "ModelLoadError",
        "PlanError",
        "PushRefusedError",
        "RunError",
        "StoredFileError",
    }
)
# Their messages are sentences for the user; the name of the class in front would only be in the way.
_RUN_ERRORS = frozenset(
    {"ExportError", "PushError", "CheckpointError", "RankFailure", "VerifierFailure", "VerifierStartError"}
)
# What libraries say when something of ours or the user's is the cause.
_EXPLAINED = {
    "Symlink loop from": "a symbolic link leads back to itself",
    "Could not determine home directory": "a path begins with ~NAME, and there is no user of that name",
    "probability tensor contains either `inf`, `nan`": (
        "the model gives probabilities that are not finite, so nothing can be sampled from it: its "
        "weights have blown up, or were broken from the start. Lower the learning rate, train in bfloat16 or "
        "float32, and go on from a checkpoint before that"
    ),
}


def is_request_error(error: BaseException) -> bool:
    """Whether the message of ``error`` tells the user what to change in the request."""
    return _is_ours(error, _REQUEST_ERRORS)


def describe(error: BaseException) -> str:
    """Return one paragraph about a run that failed; the class is named unless the error is one of ours."""
    text = str(error).strip()
    if _is_ours(error, _RUN_ERRORS) or (isinstance(error, FloatingPointError) and text):
        return text
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        places = [repr(name) for name in (error.filename, error.filename2) if name is not None]
        shown = (place if len(place) < 200 else f"{place[:200]}..." for place in places)
        return f"{error.strerror}: {' and '.join(shown)}"
    for words, meaning in _EXPLAINED.items():
        if words in text:
            return f"{meaning}. [{type(error).__name__}: {text}]"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_ours(error: BaseException, names: frozenset[str]) -> bool:
    return any(
        cls.__name__ in names and cls.__module__.startswith("posttrain.") for cls in type(error).__mro__
    )
