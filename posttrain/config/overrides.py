"""``key.sub=value`` on the command line."""

from __future__ import annotations

from posttrain.config.layers import make_room
from posttrain.config.plain_yaml import DEEPEST, Node, merge, read_yaml
from posttrain.config.problems import Problem, dotted


def apply_override(override: str, root: Node, problems: list[Problem]) -> None:
    """Put one ``key.sub=value`` on top of the document, in place."""
    where = f"override {override!r}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        problems.append(
            Problem(
                "this is not an override",
                needed="key.sub=value, for example trainer.learning_rate=1e-5",
                where=where,
            )
        )
        return
    if key.count(".") >= DEEPEST:
        problems.append(
            Problem(f"the key has more than {DEEPEST} parts", needed="key.sub=value", where=where)
        )
        return
    if key.split(".")[0] == "extends":
        problems.append(Problem("'extends' works in a file, not as an override", ("extends",), where=where))
        return
    before = len(problems)
    value = read_yaml(text, "", problems, where)
    if value is None:
        for index in range(before, len(problems)):
            fix = f"put the value in quotes: {key}='\"...\"'"
            problems[index] = Problem(
                problems[index].message, (key,), found=text, suggestion=fix, where=where
            )
        return
    steps = key.split(".")
    make_room(root, steps, value)
    node = root
    done: list[str] = []
    while True:
        step, rest = _next_step(node, steps)
        if (
            isinstance(node.value, list)
            and done == ["methods"]
            and all(isinstance(n.value, str) for n in node.value)
        ):
            node.value = {item.value: Node({}, item.where) for item in node.value}
        if isinstance(node.value, list):
            if not step.isdecimal() or int(step) >= len(node.value):
                needed = (
                    f"a position from 0 to {len(node.value) - 1}"
                    if node.value
                    else "an empty list cannot be indexed"
                )
                problems.append(
                    Problem(
                        f"{dotted(tuple(done))} is a list without an entry {step!r}",
                        (*done, step),
                        needed=needed,
                        suggestion=f"or replace the list: {'.'.join(done)}='[...]'",
                        where=where,
                    )
                )
                return
            if not rest:
                node.value[int(step)] = value
                return
            child = node.value[int(step)]
        else:
            if node.value is None:
                node.value = {}
            if not isinstance(node.value, dict):
                problems.append(
                    Problem(
                        f"{dotted(tuple(done))} is a single value, so it has no {step!r}",
                        (*done, step),
                        found=node.value,
                        where=where,
                    )
                )
                return
            if not rest:
                node.value[step] = merge(node.value[step], value) if step in node.value else value
                return
            child = node.value.setdefault(step, Node({}, where))
        node, steps, done = child, rest, [*done, step]


def _next_step(node: Node, steps: list[str]) -> tuple[str, list[str]]:
    """Split the next key off; a written key that holds dots (``pkg.module:Class``) is taken whole."""
    if isinstance(node.value, dict):
        for count in range(len(steps), 1, -1):
            joined = ".".join(steps[:count])
            if joined in node.value:
                return joined, steps[count:]
    return steps[0], steps[1:]
