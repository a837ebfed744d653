"""A configuration checked as a whole: every mistake at once, with its line.

:func:`check_config` gives the report, :func:`load_run_config` the configuration or an error with all
problems. No model, data or heavy library is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from posttrain.config.launch import SHARDED, launch_mode, processes
from posttrain.config.load import Document, holds, load_document
from posttrain.config.method_check import check_methods, json_text
from posttrain.config.problems import ConfigError, KeyPath, Problem, Report, nearest
from posttrain.config.schema import RunConfig, expand_shorthands, selector_key
from posttrain.config.selection_check import check_selection
from posttrain.config.sentences import problems_of
from posttrain.config.source_check import HUB_ID, check_data, check_model, check_reward
from posttrain.config.tasks import TASKS, Task
from posttrain.config.trainer_check import check_trainer
from posttrain.config.trainer_fields import trainer_fields
from posttrain.config.vllm_rules import has_gpu
from posttrain.rl import registry
from posttrain.rollout.truncation import truncation_problem
from posttrain.selection.settings import SWALLOWED_BELOW

_ROUNDS = 100


def check_config(path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """Return every problem of a configuration file with its overrides; raises nothing for bad input."""
    return check_and_load(path, overrides)[0]


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a checked configuration, with the parameters of its methods filled in.

    Raises:
        ConfigError: It cannot run; the message lists all problems.
    """
    report, config = check_and_load(path, overrides)
    if config is None:
        raise ConfigError(report)
    return config


def check_and_load(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Report, RunConfig | None]:
    """Return the report, and the configuration when the report holds no error."""
    document = load_document(path, overrides)
    if not document.root.value and document.problems:
        return Report(document.source, tuple(document.problems)), None
    config, problems, broken = _validate(document)
    later, filled = _check_sections(config)
    later = [_as_written(problem, document.data.get("selection")) for problem in later]
    # a section that was replaced to go on is not blamed for what replaced it
    problems += [p for p in later if not any(p.path[: len(place)] == place for place in broken)]
    located = [_locate(problem, document) for problem in problems]
    report = Report(document.source, tuple(sorted([*document.problems, *located], key=_line)))
    return report, config.model_copy(update=filled) if report.ok else None


def _validate(document: Document) -> tuple[RunConfig, list[Problem], set[KeyPath]]:
    """Validate against the schema, replacing what is wrong until the rest can be looked at.

    Returns:
        A valid configuration, the problems, and the places that were replaced.
    """
    raw = document.data
    data = expand_shorthands(raw)
    problems = list(_twice(raw.get("methods")))
    broken: set[KeyPath] = set()
    for _ in range(_ROUNDS):
        try:
            return RunConfig.model_validate_json(json_text(data), strict=True), problems, broken
        except ValidationError as error:
            found = problems_of(error, RunConfig, data)
        for problem in found:
            if problem.path not in broken:
                problems.append(_elsewhere(problem, data))
            _replace(problem.path, data, again=problem.path in broken)
            broken.add(problem.path)
    raise AssertionError(f"the configuration stays invalid after {_ROUNDS} rounds: {json.dumps(data)[:500]}")


def _replace(path: KeyPath, data: dict[str, Any], *, again: bool) -> None:
    """Take a wrong value out, in place; what cannot be missing gets a stand-in."""
    if not path:
        data.clear()
    elif path == ("task",):
        near = nearest(data.get("task"), get_args(Task))
        reinforced = "rewards" in data or "methods" in data
        data["task"] = near or ("rlvr" if reinforced else "sft")
    elif path == ("data",):
        data["data"] = {"source": ""}
        _replace(("data", "source"), data, again=True)
    elif path == ("data", "source"):
        # what a stand-in source lacks is not told either: problems below a replaced place are left out
        pairs = any(spec.pairs for task, spec in TASKS.items() if task == data.get("task"))
        data["data"]["source"] = "stand/in" if pairs else "reasoning_gym:chain_sum"
    elif path == ("rewards",):
        needed = data.get("task") == "rlvr" or data.get("s3ft") is not None
        data["rewards"] = [{"name": "verifier"}] if needed and not data.get("rewards") else []
    elif path[0] == "rewards" and path[2:] in {(), ("name",)}:
        rewards: Any = data["rewards"]
        rewards[path[1]] = {"name": "verifier"}
    else:
        _delete(path[:-1] if again and len(path) > 1 else path, data)


def _delete(path: KeyPath, data: dict[str, Any]) -> None:
    *parents, last = path
    container: Any = data
    for step in parents:
        if not holds(container, step):
            return  # an earlier problem took the parent out
        container = container[step]
    if isinstance(container, dict):
        container.pop(last, None)
    elif holds(container, last):
        container[last] = None  # the next round takes the list out


def _elsewhere(problem: Problem, data: dict[str, Any]) -> Problem:
    """Point an unknown top-level key at the section it belongs to."""
    if len(problem.path) != 1 or not problem.message.startswith("unknown key"):
        return problem
    (key,) = problem.path
    spec = next((spec for task, spec in TASKS.items() if task == data.get("task")), TASKS["rlvr"])
    if key in trainer_fields(spec):
        return dataclasses.replace(problem, needed=None, suggestion=f"move it under 'trainer': trainer.{key}")
    for section in ("model", "data", "evaluate", "export"):
        model = RunConfig.model_fields[section].annotation
        fields = getattr(model, "model_fields", None) or getattr(
            get_args(model)[0] if get_args(model) else None, "model_fields", {}
        )
        if key in fields:
            return dataclasses.replace(
                problem, needed=None, suggestion=f"move it under {section!r}: {section}.{key}"
            )
    return problem


def _twice(methods: Any) -> Iterator[Problem]:
    names = [name for name in methods if isinstance(name, str)] if isinstance(methods, list) else []
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield Problem(f"the method {name!r} is listed twice", ("methods", name), suggestion="keep one")


def _as_written(problem: Problem, selection: Any) -> Problem:
    """Name a parameter of a selector as ``selection.hft.ratio`` where the file has it so."""
    if problem.path[:2] not in {("selection", "params"), ("selection", "method")}:
        return problem
    if isinstance(selection, str):
        return dataclasses.replace(problem, path=("selection", *problem.path[2:]))
    name = selector_key(selection) if isinstance(selection, dict) else None
    return (
        problem if name is None else dataclasses.replace(problem, path=("selection", name, *problem.path[2:]))
    )


def _check_sections(config: RunConfig) -> tuple[list[Problem], dict[str, Any]]:
    """Return the problems, and the sections whose defaults were filled in."""
    spec = TASKS[config.task]
    adapter = config.model.adapter is not None
    problems, trainer = check_trainer(config.trainer, spec, ("trainer",), adapter=adapter)
    if config.model.adapter is not None and config.model.adapter.dropout and trainer.get("disable_dropout"):
        problems.append(
            Problem(
                "the dropout of the adapter has no effect: trainer.disable_dropout is true"
                + ("" if "disable_dropout" in config.trainer else f", {spec.config_class}'s default"),
                ("model", "adapter", "dropout"),
                "warning",
                found=config.model.adapter.dropout,
                suggestion="set trainer.disable_dropout: false",
            )
        )
    more, methods = check_methods(
        config.methods,
        config.task,
        spec,
        trainer,
        config.trainer,
        adapter=adapter,
        rewards=config.rewards,
    )
    problems += more
    problems += _fsdp_on_cpu(trainer)
    if spec.generates:
        problems += _sampling(config, trainer, methods)
        problems += _server(config, trainer)
    filled: dict[str, Any] = {"methods": methods}
    if config.selection is not None:
        more, filled["selection"] = check_selection(config.selection, config.task, trainer, adapter=adapter)
        problems += more
    problems += check_model(config.model)
    problems += check_data(config.data)
    for index, reward in enumerate(config.rewards):
        problems += check_reward(reward, config.data, index)
    if config.warm_start is not None:
        if spec.warm_start:
            problems += check_trainer(
                config.warm_start.trainer, TASKS["sft"], ("warm_start", "trainer"), adapter=adapter
            )[0]
        else:
            fix = "drop the section; the run itself is supervised"
            if spec.pairs:
                fix = "carry out a run of task: sft first, and name its export in model.path"
            problems.append(
                Problem(f"task {config.task!r} takes no warm start", ("warm_start",), suggestion=fix)
            )
    problems += _run_rules(config)
    problems += _lost_steps(config, trainer)
    return problems, filled


def _sampling(
    config: RunConfig, trainer: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]
) -> Iterator[Problem]:
    """Yield what the loss makes of sampling that is cut."""
    tempering = next((m.name for m in registry.build(methods) if m.samples_otherwise and not m.neutral), None)
    found = truncation_problem(trainer, config.rollout, ranks=processes(), other_temperature=tempering)
    if found is not None:
        severity: Literal["error", "warning"] = "error" if found.fatal else "warning"
        yield Problem(found.message, ("trainer", found.field), severity, suggestion=found.fix)


def _lost_steps(config: RunConfig, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield that weights in half precision swallow the steps of a small learning rate."""
    rate = trainer.get("learning_rate")
    small = not isinstance(rate, int | float) or 0 < rate < SWALLOWED_BELOW
    all_train = config.model.adapter is None and config.selection is None
    half = config.model.dtype in ("bfloat16", "float16")
    if half and all_train and small and launch_mode(trainer) not in SHARDED:
        yield Problem(
            f"all weights train in {config.model.dtype}, and nothing keeps them in fp32: of AdamW's steps, "
            "as large as the learning rate, most are smaller than half of a weight's last place, and lost",
            ("model", "dtype"),
            "warning",
            found=config.model.dtype,
            suggestion="launch with configs/accelerate/zero2.yaml, or set float32 (trainer.bf16 still "
            "computes in bfloat16), or train an adapter",
        )


def _fsdp_on_cpu(trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield that FSDP is asked for where accelerate would quietly run plain DDP."""
    if launch_mode(trainer) in ("fsdp1", "fsdp2") and trainer.get("use_cpu"):
        yield Problem(
            "FSDP shards on GPUs only, and use_cpu is set",
            ("trainer", "use_cpu"),
            suggestion="leave use_cpu out, or launch with DDP, or with DeepSpeed, which shards on CPUs too",
        )


def _server(config: RunConfig, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield how weights cannot get to a vLLM server."""
    serving = trainer.get("use_vllm") and trainer.get("vllm_mode") == "server"
    on_cpu = trainer.get("use_cpu") or not has_gpu()
    if serving and on_cpu and config.rollout.weights_dir is None:
        yield Problem(
            "vllm_mode: server sends weights over NCCL, which a CPU does not have",
            ("trainer", "vllm_mode"),
            suggestion="set rollout.weights_dir to a folder that trainer and server see",
        )
    if config.rollout.weights_dir is not None and not serving:
        yield Problem(
            "weights_dir does nothing without a vLLM server",
            ("rollout", "weights_dir"),
            "warning",
            suggestion="set trainer.use_vllm: true and trainer.vllm_mode: server, or drop it",
        )


def _run_rules(config: RunConfig) -> Iterator[Problem]:
    """Yield what does not go together between sections."""
    export, evaluate = config.export, config.evaluate
    if export is not None and export.format in {"adapter", "merged"} and config.model.adapter is None:
        yield Problem(
            f"export.format {export.format!r} needs an adapter, but all weights are trained",
            ("export", "format"),
            found=export.format,
            suggestion="set model.adapter, or format: full",
        )
    if export is not None and export.format == "delta" and TASKS[config.task].scores:
        yield Problem(
            "a delta holds weights that a base has too, and the head of a reward model is new",
            ("export", "format"),
            found="delta",
            suggestion="use format: auto",
        )
    elif export is not None and export.format == "delta" and config.model.path.startswith("embedded:"):
        yield Problem(
            "a delta belongs to a base that others can load, and the embedded model lives in its run only",
            ("export", "format"),
            found="delta",
            suggestion="train from a folder or a Hub model, or use format: auto",
        )
    if (
        export is not None
        and export.push is not None
        and not (HUB_ID.fullmatch(export.push) and "/" in export.push)
    ):
        yield Problem("this is no Hub repository", ("export", "push"), found=export.push, needed="user/name")
    if config.trainer.get("hub_token"):
        yield Problem(
            "an access token does not belong into a configuration, which is copied into the run",
            ("trainer", "hub_token"),
            suggestion="drop it, and run 'hf auth login' or set HF_TOKEN",
        )
    if evaluate is not None and not config.rewards and not TASKS[config.task].pairs:
        yield Problem(
            "the evaluation has nothing to score with: 'rewards' is empty",
            ("evaluate",),
            suggestion="add rewards: [verifier]",
        )
    if evaluate is not None and evaluate.temperature == 0 and evaluate.samples > 1:
        yield Problem(
            f"temperature 0 draws the same completion {evaluate.samples} times",
            ("evaluate", "temperature"),
            "warning",
            found=0,
            suggestion="set a temperature above 0, or k: [1] and samples: 1",
        )
    if TASKS[config.task].pairs and not TASKS[config.task].scores:
        yield from _preference_rules(config)
    run_dir = Path(config.run_dir).expanduser()
    if run_dir.is_file():
        yield Problem(
            "run_dir is a file",
            ("run_dir",),
            found=config.run_dir,
            needed="a folder, new or of a run to resume",
        )


def _preference_rules(config: RunConfig) -> Iterator[Problem]:
    evaluate, adapter = config.evaluate, config.model.adapter
    targets = adapter.target_modules if adapter is not None else ""
    if evaluate is not None and evaluate.temperature > 0 and (evaluate.temperature, evaluate.top_p) != (1, 1):
        name = "temperature" if evaluate.temperature != 1 else "top_p"
        yield Problem(
            "the KL spent can only be estimated on the model's own samples: it is left out",
            ("evaluate", name),
            "warning",
            found=getattr(evaluate, name),
            suggestion="set temperature: 1 and top_p: 1",
        )
    if len(config.rewards) > 1:
        yield Problem(
            "only the first reward judges continuations",
            ("rewards", 1),
            "warning",
            found=config.rewards[1].name,
            suggestion="drop the others",
        )
    if isinstance(targets, list) and "lm_head" in targets:
        yield Problem(
            "an adapter on lm_head would never be trained: TRL reads log-probabilities off its weight",
            ("model", "adapter", "target_modules"),
            found=targets,
            suggestion="take lm_head out of the list",
        )


def _locate(problem: Problem, document: Document) -> Problem:
    node, depth = document.find(problem.path)
    located = dataclasses.replace(problem, where=node.where if depth else document.source)
    if problem.message.endswith("does not exist") and isinstance(node.value, str):
        file = (node.where or "").rpartition(":")[0]
        if _commented(file, node.value):
            told = f"the comments of {file} name it and may say how it is made"
            told += f"; {problem.suggestion}" if problem.suggestion else ""
            located = dataclasses.replace(located, suggestion=told)
    return located


def _commented(file: str, name: str) -> bool:
    """Return whether a comment line of the configuration names a file: some are made by a script first."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # an override, which is said in no file
        return False
    return any(line.lstrip().startswith("#") and name in line for line in lines)


def _line(problem: Problem) -> tuple[int, str, int]:
    """Sort files by name and line, overrides last."""
    file, _, line = (problem.where or "").rpartition(":")
    if (problem.where or "").startswith("override "):
        return 2, problem.where or "", 0
    return (1, file, int(line)) if line.isdecimal() else (0, problem.where or "", 0)
