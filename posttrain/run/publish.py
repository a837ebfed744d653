"""The export of a run, and its upload."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from posttrain.export.card import card_of
from posttrain.export.export import MARKER, Format, export_model
from posttrain.export.push import can_push
from posttrain.run.directory import RunDirectory, RunError
from posttrain.stored import stored_config


def publish(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    run: RunDirectory | None,
    format: Format,
    pushing: bool = False,
    probe_texts: Sequence[str] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Export a model, verified by reloading it.

    Args:
        pushing: Whether it is to be uploaded: an adapter then brings along a base that only this machine has.
        base: Base of a delta, ``model.path`` of the run when None; or the address of an adapter's base.

    Returns:
        ``folder``, ``format``, ``base``, ``base_bundled``, ``dtype``, ``bytes``, ``density``,
        ``base_revision`` and ``max_difference`` of the reloaded logits.

    Raises:
        RunError: ``base`` was given, and what is exported has none.
        posttrain.export.export.ExportError: See :func:`posttrain.export.export.export_model`.
    """
    settings: dict[str, Any] = {"probe_texts": probe_texts} if probe_texts else {}
    if format == "delta":
        settings |= _delta_settings(run, base)
    elif base is not None:
        if not isinstance(model, PeftModel) or format not in ("auto", "adapter"):
            raise RunError(
                "--base says what an adapter or a delta is put on, and this export holds all weights: drop "
                "it, or ask for --format delta"
            )
        settings["base_path"] = base
    result = export_model(
        model,
        tokenizer,
        folder,
        format=format,
        card=card_of(run) if run is not None else None,
        bundle_base=False if base is not None else _bundle(model, run, pushing=pushing),
        extras=[] if run is None else sorted(run.modules.glob("*.safetensors")),
        **settings,
    )
    facts = {key: value for key, value in asdict(result).items() if key != "comparison"}
    return {**facts, "max_difference": result.comparison.max_difference}


def ready(source: str, format: str) -> dict[str, Any] | None:
    """Return what :func:`publish` said about an export that lies in ``source`` and can be uploaded as it is,
    or None."""
    folder = Path(source).expanduser()
    if not can_push(folder):
        return None
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if format not in ("auto", marker["format"]):
        return None
    names = ("format", "base", "base_bundled", "dtype", "bytes", "density", "base_revision")
    facts = {name: marker.get(name) for name in names}
    difference = marker["comparison"]["max_difference"]
    return {"folder": str(folder.absolute()), **facts, "max_difference": difference}


def _delta_settings(run: RunDirectory | None, base: str | None) -> dict[str, Any]:
    """Where the run started, before any warm start, and what it was allowed to change."""
    if run is None:
        return {"base_path": base}
    config = stored_config(run.config)
    model = config["model"]
    found = {"base_path": base or model["path"], "about": {"selection": config.get("selection")}}
    return found if base else {**found, "base_revision": model.get("revision")}


def _bundle(model: Any, run: RunDirectory | None, *, pushing: bool) -> bool | None:
    """Whether the adapter must bring its base: the run made it, or it leaves the machine it lies on."""
    if not isinstance(model, PeftModel):
        return None
    base = Path(getattr(model.get_base_model().config, "_name_or_path", "") or "embedded:").expanduser()
    if not base.is_dir():
        return None
    own = run is not None and base.resolve().is_relative_to(run.root.resolve())
    return True if own or pushing else None
