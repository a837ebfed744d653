"""Versions: what is installed, what was tested, and who disagrees with whom. Nothing heavy is imported."""

from __future__ import annotations

import platform
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import posttrain

SHOWN = (
    "python",
    "posttrain",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "vllm",
    "deepspeed",
)
"""What the table of versions always names, installed or not."""

_CHECKED = (
    "posttrain",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "vllm",
    "deepspeed",
    "torchvision",
    "torchaudio",
    "bitsandbytes",
    "flash-attn",
    "xformers",
    "liger-kernel",
    "unsloth",
    "unsloth-zoo",
    "math-verify",
    "reasoning-gym",
)
# Of these extras the ranges count where the package is there: TRL says which vLLM it can talk to.
_EXTRAS = ("vllm", "deepspeed")


@dataclass(frozen=True)
class Requires:
    """One package that another one asks for.

    Attributes:
        by: Who asks.
        package: For what.
        needed: Range, such as ``>=1.16,<1.17``; empty when any version will do.
        installed: Version at hand, or None.
        optional: Whether it is asked for by an extra.
    """

    by: str
    package: str
    needed: str
    installed: str | None
    optional: bool = False

    @property
    def met(self) -> bool:
        """Whether the range holds the installed version; an extra that is absent asks for nothing."""
        if self.installed is None:
            return self.optional
        return SpecifierSet(self.needed).contains(self.installed, prereleases=True)


def installed(name: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the version of each package of :data:`SHOWN`, and of the others that are installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "posttrain": posttrain.__version__}
    found |= {name: installed(name) for name in SHOWN if name not in found}
    others = {name: installed(name) for name in _CHECKED if name not in found}
    return found | {name: version for name, version in others.items() if version is not None}


def requirements() -> list[Requires]:
    """Return what posttrain and the packages beside it ask of each other."""
    found = []
    for by in _CHECKED:
        for text in _required(by):
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue  # of another tool's dialect
            name = canonicalize_name(wanted.name)
            always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if not always and not any(wanted.marker.evaluate({"extra": extra}) for extra in _EXTRAS):  # type: ignore[union-attr]
                continue
            if name == "python":
                continue
            found.append(Requires(by, wanted.name, str(wanted.specifier), installed(wanted.name), not always))
    return found


def python_range() -> str:
    """Return the Python versions posttrain is for."""
    try:
        return metadata.metadata("posttrain")["Requires-Python"] or ""
    except (metadata.PackageNotFoundError, KeyError):
        return str(_project().get("requires-python", ""))


def _required(name: str) -> list[str]:
    try:
        return list(metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        return _own() if name == "posttrain" else []


def _own() -> list[str]:
    """Return the requirements of a checkout that is used without being installed."""
    project = _project()
    extras = project.get("optional-dependencies", {})
    return [
        *project.get("dependencies", ()),
        *(f"{text}; extra == '{name}'" for name in _EXTRAS for text in extras.get(name, ())),
    ]


def _project() -> dict[str, Any]:
    path = Path(posttrain.__file__).resolve().parents[1] / "pyproject.toml"
    try:
        project: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return {}
    return project
