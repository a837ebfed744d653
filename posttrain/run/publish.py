"""The export of a run, and its upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
) -> dict[str, Any]:
    """Export a model, verified by reloading it, and upload it if asked.

    Returns:
        ``folder``, ``format``, ``base``, ``base_bundled``, ``dtype``, ``bytes``, ``max_difference`` of the
        reloaded logits, and ``pushed`` (address or None).

    Raises:
        posttrain.export.export.ExportError: See :func:`posttrain.export.export.export_model`.
        posttrain.export.push.PushError: See :func:`posttrain.export.push.push`.
    """
    probes: dict[str, Any] = {"probe_texts": probe_texts} if probe_texts else {}
    result = export_model(
        model,
        tokenizer,
        folder,
        format=format,
        card=card_of(run) if run is not None else None,
        bundle_base=_bundle(model, run, pushing=push_to is not None),
        **probes,
    )
    pushed = push(result.folder, push_to, private=private) if push_to else None
    facts = {key: value for key, value in asdict(result).items() if key != "comparison"}
    return {**facts, "max_difference": result.comparison.max_difference, "pushed": pushed}


def _bundle(model: Any, run: RunDirectory | None, *, pushing: bool) -> bool | None:
    """Whether the adapter must bring its base: the run made it, or it leaves the machine it lies on."""
    if not isinstance(model, PeftModel):
        return None
    base = Path(getattr(model.get_base_model().config, "_name_or_path", "") or "embedded:").expanduser()
    if not base.is_dir():
        return None
    own = run is not None and base.resolve().is_relative_to(run.root.resolve())
    return True if own or pushing else None
