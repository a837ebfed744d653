"""Runs that are looked at and never started: folders with a tokenizer and shapes, and rows in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import processors

from posttrain.config.check import load_run_config
from posttrain.deep.check import deep_check
from posttrain.deep.findings import DeepReport, Finding
from posttrain.models.embedded import build_model, build_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def checkpoint(folder: Path, *, template: str | None = None, bos: bool = False, **special: str) -> Path:
    """A folder that looks like a checkpoint; its weights are no weights, so loading them would fail."""
    build_model().config.save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def look(folder: Path, config: dict[str, Any], *overrides: str) -> DeepReport:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), **config}))
    return deep_check(load_run_config(file, overrides))


def section(report: DeepReport, name: str) -> Any:
    (found,) = [part for part in report.sections if part.name == name]
    return found


def finding(report: DeepReport, name: str, words: str) -> Finding:
    """The one finding of a section whose message has these words."""
    found = [one for one in section(report, name).findings if words in one.message]
    assert len(found) == 1, [one.message for one in section(report, name).findings]
    return found[0]
