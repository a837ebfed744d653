"""What a configuration points at: model, data, rewards. Nothing is downloaded or loaded."""

from __future__ import annotations

import ast
import re
import string
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.generated_tasks import check_task, task_sources
from posttrain.config.problems import KeyPath, Problem, near_file, nearest
from posttrain.config.schema import DataConfig, ModelConfig, RewardConfig, SplitConfig
from posttrain.patterns import UNREADABLE

GENERATED = "reasoning_gym:"
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
EMBEDDED_MODELS = ("embedded:char-llama",)
FUNCTION = "python:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_PARAMS = ("name", "revision", "data_dir", "data_files")


def check_model(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with ``model.path`` and ``model.tokenizer``."""
    for key, name in (("path", model.path), ("tokenizer", model.tokenizer)):
        if name is None:
            continue
        path: KeyPath = ("model", key)
        folder = Path(name).expanduser()
        if name.startswith("embedded:"):
            if name not in EMBEDDED_MODELS or key == "tokenizer":
                near = f"did you mean {EMBEDDED_MODELS[0]!r}?" if key == "path" else "leave it out"
                yield Problem("there is no such embedded model", path, found=name, suggestion=near)
        elif _looks_local(name) or folder.exists():
            wanted = ("config.json",) if key == "path" else ("tokenizer.json", "tokenizer_config.json")
            wanted = (*wanted, "adapter_config.json")
            if not folder.is_dir():
                what = "is a file" if folder.is_file() else "does not exist"
                yield Problem(
                    f"the folder {name} {what}", path, needed="a folder, or a Hub id such as user/name"
                )
            elif not any((folder / file).is_file() for file in wanted):
                yield Problem(
                    f"the folder {name} holds none of {', '.join(wanted)}", path, needed="a checkpoint folder"
                )
        elif not HUB_ID.fullmatch(name):
            yield Problem(
                "this is neither a folder nor a Hub id",
                path,
                found=name,
                needed="user/name, a folder, or " + EMBEDDED_MODELS[0],
            )


def check_data(data: DataConfig) -> Iterator[Problem]:
    """Yield what is wrong with the ``data`` section."""
    source = data.source
    generated = source.startswith(GENERATED)
    if generated:
        yield from check_task(source.removeprefix(GENERATED), data.params)
    elif _is_file(source):
        yield from _file_problems(source, ("data", "source"))
        if data.params:
            yield Problem(
                "a file takes no params",
                ("data", "params"),
                found=data.params,
                suggestion="drop them; on the command line: data.params=null",
            )
    elif source in task_sources():
        fix = f"write {GENERATED}{source}"
        yield Problem(
            "this is the name of a generated task, not of a Hub data set",
            ("data", "source"),
            found=source,
            suggestion=fix,
        )
    elif not HUB_ID.fullmatch(source) and not Path(source).expanduser().is_dir():
        prefix = source.partition(":")[0] + ":"
        near = nearest(prefix, [GENERATED]) if ":" in source else None
        yield Problem(
            "this is no data source",
            ("data", "source"),
            found=source,
            needed=f"{GENERATED}TASK, a file ({', '.join(FILE_SUFFIXES)}), or a Hub id such as user/name",
            suggestion=f"write {GENERATED}{source.partition(':')[2]}" if near else None,
        )
    else:
        yield from _hub_problems(data.params)
    for name, split in (("train", data.train), ("eval", data.eval)):
        yield from _split_problems(name, split, generated, _is_file(source))
    if data.label_noise is not None and data.label_noise.file is not None:
        yield from _file_problems(data.label_noise.file, ("data", "label_noise", "file"))
    if data.probe is not None and data.probe.file is not None:
        yield from _file_problems(data.probe.file, ("data", "probe", "file"))
    if data.prompt_pattern is not None:
        yield from _pattern_problems(data.prompt_pattern, ("data", "prompt_pattern"), groups=1)
    if data.prompt_template is not None:
        yield from _template_problems(data.prompt_template)


def _hub_problems(params: Mapping[str, Any]) -> Iterator[Problem]:
    for name in params:
        if name not in HUB_PARAMS:
            near = nearest(name, HUB_PARAMS)
            yield Problem(
                f"Hub data has no parameter {name!r}",
                ("data", "params", name),
                needed=f"one of {', '.join(HUB_PARAMS)}",
                suggestion=f"did you mean {near!r}?" if near else None,
            )


def _split_problems(name: str, split: SplitConfig, generated: bool, local: bool) -> Iterator[Problem]:
    if split.file is not None:
        if generated:
            yield Problem(
                "a generated task reads no file",
                ("data", name, "file"),
                found=split.file,
                suggestion="drop it, or set data.source to a file",
            )
        else:
            yield from _file_problems(split.file, ("data", name, "file"))
    if split.split is not None and (generated or local):
        fix = "use 'file' for another file" if local else "use 'seed' and 'size'"
        yield Problem(
            "split names a part of a Hub data set; this source has none",
            ("data", name, "split"),
            found=split.split,
            suggestion=fix,
        )


def _template_problems(template: str) -> Iterator[Problem]:
    path: KeyPath = ("data", "prompt_template")
    try:
        parsed = [
            (name, form, how) for _, name, form, how in string.Formatter().parse(template) if name is not None
        ]
    except ValueError as error:
        fix = "write {{ and }} for braces that are text"
        yield Problem(f"the template cannot be read: {error}", path, found=template, suggestion=fix)
        return
    wrong = [name for name, form, how in parsed if not name.isidentifier() or form or how]
    example = "{column}, for example {question}"
    if wrong:
        message = f"the template field {{{wrong[0]}}} is not a plain column name"
        yield Problem(message, path, found=template, needed=example)
    elif not parsed:
        message = "the template names no column, so all prompts are the same"
        yield Problem(message, path, found=template, needed=example)


def _pattern_problems(pattern: str, path: KeyPath, groups: int | None = None) -> Iterator[Problem]:
    try:
        compiled = re.compile(pattern)
    except UNREADABLE as error:
        yield Problem(f"this is not a regular expression: {error}", path, found=pattern)
        return
    if groups is not None and compiled.groups != groups:
        message = f"the regular expression has {compiled.groups} groups"
        fix = "write (?:...) around what is not wanted" if compiled.groups else "put the wanted part in (...)"
        yield Problem(message, path, found=pattern, needed=f"{groups} group", suggestion=fix)


def _file_problems(name: str, path: KeyPath) -> Iterator[Problem]:
    file = Path(name).expanduser()
    if file.is_dir():
        yield Problem(f"{name} is a folder", path, needed=f"one file ({', '.join(FILE_SUFFIXES)})")
    elif not file.is_file():
        near = near_file(file)
        relative = "paths are relative to the folder the command runs in"
        fix = f"did you mean {file.parent / near}?" if near else relative
        yield Problem(f"the file {name} does not exist", path, suggestion=fix)
    elif file.suffix.lower() not in FILE_SUFFIXES:
        yield Problem(
            f"{file.suffix or 'no suffix'} is not a known kind of file",
            path,
            found=name,
            needed=", ".join(FILE_SUFFIXES),
        )


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return (
        source.lower().endswith(FILE_SUFFIXES)
        or path.is_file()
        or (_looks_local(source) and not path.is_dir())
    )


def _looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def check_reward(reward: RewardConfig, data: DataConfig, index: int) -> Iterator[Problem]:
    """Yield what is wrong with one reward: its name and all its parameters."""
    from posttrain.rewards.registry import VERIFIERS, ParameterError
    from posttrain.rewards.reward import MODEL_PREFIX, verifier_spec

    path: KeyPath = ("rewards", index)
    if reward.name.startswith(MODEL_PREFIX):
        yield from _reward_model_problems(reward, path)
        return
    if reward.name.startswith(FUNCTION):
        yield from _function_problems(reward.name, (*path, "name"))
        return
    known = ["verifier", *(name for name in VERIFIERS if name != "reasoning_gym")]
    if reward.name not in (*known, "reasoning_gym"):
        near = nearest(reward.name, known)
        yield Problem(
            f"unknown reward {reward.name!r}",
            (*path, "name"),
            needed=f"one of {', '.join(known)}, {FUNCTION}package.module.function, {MODEL_PREFIX}PATH",
            suggestion=f"did you mean {near!r}?" if near else None,
        )
        return
    try:
        verifier_spec(reward, data)
    except ParameterError as error:
        for name, message in error.problems:
            yield Problem(message, (*path, "params", name) if name in reward.params else (*path, "name"))
    except ValueError as error:
        yield Problem(str(error), (*path, "name"))
    pattern = reward.params.get("pattern")
    if reward.name == "format" and isinstance(pattern, str):
        yield from _pattern_problems(pattern, (*path, "params", "pattern"))


def _reward_model_problems(reward: RewardConfig, path: KeyPath) -> Iterator[Problem]:
    """Look for the model; it is not loaded."""
    from posttrain.rewards.model import check_params
    from posttrain.rewards.registry import ParameterError

    place = reward.name.partition(":")[2]
    folder = Path(place).expanduser()
    if _looks_local(place) or folder.exists():
        wanted = ("config.json", "adapter_config.json", "config.yaml")
        if not any((folder / file).is_file() for file in wanted):
            yield Problem(
                f"the folder {place} is no reward model"
                if folder.is_dir()
                else f"there is no folder {place}",
                (*path, "name"),
                needed="a run of task: reward, a folder with a reward model, or a Hub id such as user/name",
            )
    elif not HUB_ID.fullmatch(place):
        yield Problem(
            "this names no reward model",
            (*path, "name"),
            found=reward.name,
            needed="model:FOLDER or model:user/name",
        )
    try:
        check_params(reward.params)
    except ParameterError as error:
        for name, message in error.problems:
            yield Problem(message, (*path, "params", name))
    idle = [
        name
        for name in ("deadline", "workers")
        if getattr(reward, name) != RewardConfig.model_fields[name].default
    ]
    if idle:
        yield Problem(
            f"{idle[0]} is of verifier processes, and a reward model runs in the training process",
            (*path, idle[0]),
            "warning",
            suggestion="drop it",
        )


def _function_problems(name: str, path: KeyPath) -> Iterator[Problem]:
    """Look for a user's function in the source of its module; the module is not imported."""
    module, _, function = name.removeprefix(FUNCTION).rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module) or not function.isidentifier():
        yield Problem("this names no function", path, found=name, needed=f"{FUNCTION}package.module.function")
        return
    file = _module_file(module)
    if file is None:
        yield Problem(
            f"the module {module!r} is not found",
            path,
            found=name,
            suggestion="run the command in the folder that holds it, or set PYTHONPATH",
        )
    elif file.suffix == ".py":
        try:
            names = _defined(ast.parse(file.read_bytes()))
        except (SyntaxError, ValueError) as error:
            yield Problem(f"the module {module!r} is not valid Python: {error}", path, found=name)
            return
        if function not in names and "*" not in names:
            near = nearest(function, names)
            fix = f"did you mean {FUNCTION}{module}.{near}?" if near else None
            yield Problem(f"the module {module!r} defines no {function!r}", path, found=name, suggestion=fix)


def _module_file(module: str) -> Path | None:
    """Return the file of a module on the search path; packages that only exist once imported are not seen."""
    steps = module.split(".")
    for entry in ["", *sys.path]:
        base = Path(entry or ".").joinpath(*steps)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
