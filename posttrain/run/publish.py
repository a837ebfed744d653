"""The export of a run, and its upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from posttrain.export.card import card_of
from posttrain.export.export import Format, export_model
from posttrain.export.push import push
from posttrain.run.directory import RunDirectory


def publish(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    run: RunDirectory | None,
    format: Format,
    push_to: str | None,
    private: bool,
    probe_texts: Sequence[str] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Export a model, verified by reloading it, and upload it if asked.

    Args:
        base: Base of a delta; ``model.path`` of the run when None.

    Returns:
        ``folder``, ``format``, ``base``, ``base_bundled``, ``dtype``, ``bytes``, ``density``,
        ``max_difference`` of the reloaded logits, and ``pushed`` (address or None).

    Raises:
        posttrain.export.export.ExportError: See :func:`posttrain.export.export.export_model`.
        posttrain.export.push.PushError: See :func:`posttrain.export.push.push`.
    """
    settings: dict[str, Any] = {"probe_texts": probe_texts} if probe_texts else {}
    if format == "delta":
        settings |= _delta_settings(run, base)
    result = export_model(
        model,
        tokenizer,
        folder,
        format=format,
        card=card_of(run) if run is not None else None,
        bundle_base=_bundle(model, run, pushing=push_to is not None),
        extras=[] if run is None else sorted(run.modules.glob("*.safetensors")),
        **settings,
    )
    pushed = push(result.folder, push_to, private=private) if push_to else None
    facts = {key: value for key, value in asdict(result).items() if key != "comparison"}
    return {**facts, "max_difference": result.comparison.max_difference, "pushed": pushed}


def _delta_settings(run: RunDirectory | None, base: str | None) -> dict[str, Any]:
    """Where the run started, before any warm start, and what it was allowed to change."""
    if run is None:
        return {"base_path": base}
    config = yaml.safe_load(run.config.read_text(encoding="utf-8"))
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
