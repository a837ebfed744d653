"""A run that is carried out once, however often it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from posttrain.config.schema import RunConfig
from posttrain.run.directory import RunDirectory, RunError, write_json
from posttrain.run.train import train
from posttrain.stored import stored_json


def train_once(config: RunConfig, name: str, say: Callable[[str], None]) -> Path:
    """Train, or go on with a run that was stopped, or find it done; return the folder of its export.

    Args:
        config: With an ``export`` section; its ``run_dir`` also gets a ``done.json``.
        name: What the run is to the user.
        say: Gets a line when there is something to do.

    Raises:
        RunError: It is done already, with another configuration.
    """
    run = RunDirectory(Path(config.run_dir))
    done = run.root / "done.json"
    now = json.loads(config.model_dump_json())
    if done.is_file():
        if stored_json(done).get("config") != now:
            raise RunError(
                f"{name} is done already in {run.root}, with another configuration than now: put the old one "
                "back, or choose another --out"
            )
        return run.export
    say(f"{name}: training")
    train(config, resume=run.config.is_file())
    write_json(done, {"model": str(run.export), "config": now})
    return run.export
