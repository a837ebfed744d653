"""Files of a run as crashes, bad disks and careless hands leave them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from fuzz_configs import HOSTILE, places

OTHER_JSON: list[bytes] = [
    *(text.encode("latin-1") for text in HOSTILE["json"]),
    b"[" * 3000 + b"]" * 3000,
    b'{"a": ' + b"9" * 5000 + b"}",
]


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file as crashes, bad disks and careless hands do; return what was done."""
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(data[:at])
        return f"cut at {at}"
    if kind == 1:
        path.write_bytes(b"")
        return "emptied"
    if kind == 2:
        path.unlink()
        return "removed"
    if kind == 3:
        path.unlink()
        path.mkdir()
        return "made a folder"
    if kind == 4 and data:
        garbled = bytearray(data)
        for _ in range(rng.choice([1, 8, 64])):
            garbled[rng.randrange(min(len(data), 4096))] = rng.randrange(256)
        path.write_bytes(garbled)
        return "garbled"
    if kind == 5 and path.suffix in (".json", ".yaml"):
        return _other_value(rng, path)
    new = rng.choice(OTHER_JSON)
    path.write_bytes(new)
    return f"replaced by {new[:20]!r}"


def _other_value(rng: random.Random, path: Path) -> str:
    """Exchange or drop one value inside a JSON or YAML file."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    below = [place for place in places(content) if place]
    if not below:
        return "left"
    *steps, last = rng.choice(below)
    owner = content
    for step in steps:
        owner = owner[step]
    if rng.random() < 0.3 and isinstance(owner, dict):
        del owner[last]
        done = f"dropped {[*steps, last]}"
    else:
        owner[last] = rng.choice(
            [
                None,
                True,
                -1,
                10**20,
                1.5,
                "",
                "a",
                "../../x",
                "/x",
                [],
                {},
                [None],
                {"a": 1},
                float("nan"),
                "\0",
                "x" * 5000,
            ]
        )
        done = f"set {[*steps, last]} to {owner[last]!r:.40}"
    path.write_text(
        json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content), encoding="utf-8"
    )
    return done
