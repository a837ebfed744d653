"""Configurations and overrides with things wrong in them, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HOSTILE: dict[str, list[Any]] = json.loads(Path(__file__).with_name("hostile.json").read_text())
"""Values for settings, cells for data rows, and texts in place of a JSON file's."""

BASE: dict[str, Any] = {
    "task": "rlvr",
    "run_dir": "run",
    "model": {"path": "embedded:char-llama"},
    "data": {
        "source": "reasoning_gym:chain_sum",
        "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_pattern": r"(\d+ [+-] \d+ =)",
        "train": {"size": 8},
        "eval": {"size": 4},
    },
    "rewards": ["verifier"],
    "methods": {"ace": {"alpha": 1.0}},
    "trainer": {
        "max_steps": 2,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
    },
    "evaluate": {"k": [1], "samples": 1, "max_new_tokens": 4},
    "warm_start": {"trainer": {"max_steps": 2}},
    "export": {},
}

SECTIONS: dict[str, Any] = {
    "model": {
        "path": "x/y",
        "revision": "main",
        "dtype": "float32",
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj"]},
        "tokenizer": "x/y",
    },
    "data": {
        "source": "rows.jsonl",
        "columns": {"prompt": "q"},
        "prompt_template": "{prompt}",
        "system_prompt": "s",
        "max_prompt_tokens": 8,
        "over_length": "filter",
        "label_noise": {"share": 0.1},
    },
    "rewards": [
        {"math": {"weight": 2, "deadline": 1.0, "extract": "boxed", "memory_gib": 1}},
        {"name": "format", "params": {"pattern": "a"}},
        "python:m.f",
    ],
    "methods": ["ace", "lp_reg", "aepo", "ttrl", {"constrained": {"thresholds": {"format": 0.9}}}],
    "selection": {"hft": {"fraction": 0.5}},
    "rollout": {"truncated_sampling": "accept"},
    "evaluate": {"k": [1, 4], "samples": 4, "temperature": 0.5, "top_p": 0.9},
    "export": {"format": "merged", "push": "me/it", "dir": "out"},
    "threads": 2,
    "watchdog": {"step": 10},
    "s3ft": {},
}

NASTY_VALUES: list[Any] = [*HOSTILE["values"], "x" * 5000]


def nested(depth: int, *, list_too: bool = True) -> Any:
    """Return mappings (and lists) inside one another."""
    value: Any = 1
    for level in range(depth):
        value = [value] if list_too and level % 2 else {"a": value}
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value below ``value``, its own (empty) one first."""
    yield path
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, below in entries:
        yield from places(below, (*path, key))


def misspelt(rng: random.Random, word: str) -> str:
    """Return ``word`` with one slip of the fingers."""
    if not word:
        return "x"
    at = rng.randrange(len(word))
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + "x" + word[at + 1 :],
            word.upper(),
            word + "s",
            word.replace("_", "-"),
        ]
    )


def hostile_config(rng: random.Random) -> dict[str, Any]:
    """Return a configuration with up to four things wrong."""
    config: dict[str, Any] = json.loads(json.dumps(BASE))
    config["task"] = rng.choice(["rlvr", "rlvr", "sft", "preference", "reward"])
    for name in rng.sample(sorted(SECTIONS), rng.randint(0, 3)):
        config[name] = json.loads(json.dumps(SECTIONS[name]))
    for _ in range(rng.randint(1, 4)):
        path = rng.choice(list(places(config))[1:] or [("task",)])
        owner: Any = config
        for step in path[:-1]:
            owner = owner[step]
        kind = rng.randrange(6)
        last = path[-1]
        if kind == 0 and isinstance(owner, dict):
            owner[misspelt(rng, str(last))] = owner.pop(last)
        elif kind == 1 and isinstance(owner, dict):
            del owner[last]
        elif kind == 2 and isinstance(owner, dict):
            owner[
                rng.choice(
                    ["", "extends", "x", "learning_rate", "[red]", "a.b", "__class__", "name", "\u200b"]
                )
            ] = rng.choice(NASTY_VALUES)
        elif kind == 3:
            owner[last] = nested(rng.choice([3, 30, 80]))
        else:
            owner[last] = rng.choice(NASTY_VALUES)
    return config


def hostile_text(rng: random.Random) -> bytes:
    """Return the bytes of a configuration file that may not even be YAML."""
    text = yaml.safe_dump(
        hostile_config(rng) if rng.random() < 0.7 else BASE, sort_keys=False, allow_unicode=True
    )
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(14)
    if kind == 0:
        lines[at] = "\t" + lines[at]
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        lines[at] = lines[at] + rng.choice(
            [
                ": :",
                " !!python/object:os.system",
                " *x",
                " &a *a",
                " {",
                " [",
                " '",
                ' "',
                " |",
                " >",
                " #",
                " ? ",
                " %",
                " @",
                " `",
                "---",
                " ${X}",
            ]
        )
    elif kind == 3:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    elif kind == 4:
        lines.insert(
            rng.randrange(len(lines)),
            rng.choice(
                [
                    "---",
                    "...",
                    "%YAML 9.9",
                    "? [a]\n: b",
                    "<<: *nobody",
                    "<<: 3",
                    "extends: .",
                    "extends: [config.yaml]",
                    "extends: /dev",
                    "- a",
                    "1: 2",
                    "null: 1",
                    "&a a: *a",
                    "=: 1",
                ]
            ),
        )
    elif kind == 5:
        lines.append("bomb: &a0 [x,x,x,x,x,x,x,x,x]")
        lines += [f"bomb{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    elif kind == 6:
        lines.append("deep: " + "[" * 5000 + "]" * 5000)
    elif kind == 7:
        lines.append("deep: " + "{a: " * 3000 + "1" + "}" * 3000)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == 8:
        data = data.replace(b"\n", b"\r\n")
    elif kind == 9:
        data = b"\xef\xbb\xbf" + data
    elif kind == 10:
        data = data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "latin-1"]), "replace")
    elif kind == 11:
        cut = rng.randrange(len(data) + 1)
        data = (
            data[:cut] + rng.choice([b"", b"\xff", b"\0", b"\x1b[2J", b"\xed\xa0\x80", b"\x85"]) + data[cut:]
        )
    elif kind == 12:
        data = rng.choice(
            [
                b"",
                b"\n",
                b"- a\n- b\n",
                b"text",
                b"null",
                b"42",
                b"{}",
                b"[]",
                b"~",
                b"\xef\xbb\xbf",
                b"# nothing\n",
                bytes(rng.randrange(256) for _ in range(200)),
            ]
        )
    elif kind == 13:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def hostile_override(rng: random.Random) -> str:
    """Return a ``KEY=VALUE`` that may be neither."""
    key = ".".join(map(str, rng.choice(list(places(BASE))[1:])))
    key = rng.choice(
        [
            key,
            misspelt(rng, key),
            "",
            ".",
            "..",
            "a..b",
            key + ".",
            key + ".x",
            key + ".0",
            "methods.ace",
            "trainer." + "a." * 500 + "b",
        ]
    )
    value = rng.choice(NASTY_VALUES)
    text = rng.choice(
        [
            json.dumps(value, ensure_ascii=False),
            str(value),
            "[",
            "{",
            "{a: ",
            "&a [*a]",
            "!!python/name:os",
            "\t",
            "'",
            "*x",
        ]
    )
    return rng.choice([f"{key}={text}", f"{key}{text}", f"{key}=", f"={text}", f"{key}:{text}"])
