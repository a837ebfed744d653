"""Every verb explains itself: complete, with an example, on a terminal of 80 columns and without colour."""

import re

import click
import pytest
import typer
from typer.testing import CliRunner

import posttrain
from posttrain.cli import ORDER, app

ROOT = typer.main.get_command(app)


def walk(command, path=()):
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        yield from walk(sub, (*path, name))


VERBS = dict(walk(ROOT))


def shown(path):
    done = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_is_complete_on_80_columns(path):
    text = shown(path)
    assert "\x1b" not in text
    example = re.compile(r"^ *(posttrain|accelerate launch) ")
    for line in text.splitlines():
        assert len(line) <= 80 or example.match(line), line
    commands = text.partition("Commands:")[2]
    assert "..." not in commands, "the first line of a verb does not fit into its group's list"
    for parameter in VERBS[path].params:
        assert getattr(parameter, "help", None), f"{path}: {parameter.name} has no help"
        if isinstance(parameter, click.Argument) or parameter.param_type_name == "argument":
            assert parameter.metavar, f"{path}: the argument {parameter.name} has no name in the help"
            assert parameter.metavar == parameter.metavar.upper()


@pytest.mark.parametrize("verb", ORDER)
def test_each_verb_has_an_example_that_its_parser_knows(verb):
    """Options in examples exist, so an option that is renamed takes its example along."""
    lines = re.findall(r"^ +(?:accelerate launch .*-m )?posttrain (.+?)(?: +#.*)?$", shown([verb]), re.M)
    examples = [line.split() for line in lines if line.split()[0] == verb and len(line.split()) > 1]
    assert examples or verb == "doctor" or verb == "methods", f"posttrain {verb} --help has no example"
    for words in examples:
        command = VERBS[tuple(words[:2])] if tuple(words[:2]) in VERBS else VERBS[(verb,)]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words[1:]:
            assert not word.startswith("-") or word in known, (words, word)


def test_the_order_names_every_verb_once():
    assert sorted(ORDER) == sorted(ROOT.commands)


def test_version_and_what_the_package_offers():
    assert CliRunner().invoke(app, ["--version"]).output == f"posttrain {posttrain.__version__}\n"
    assert set(posttrain.__all__) <= set(dir(posttrain))  # completion, and Python's "did you mean"
    with pytest.raises(ImportError, match="GRPOTrainr"):
        from posttrain import GRPOTrainr  # noqa: F401
