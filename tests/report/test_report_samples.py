"""Completions in the terminal: which are shown, how, and while a run writes them."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.report.samples import LENGTH, at_step, follow, held_out, newest, print_samples
from posttrain.run.directory import RunDirectory


def row(step, index, status="wrong", completion=None):
    text = f"text {step}.{index}" if completion is None else completion
    rewards = {"verifier": float(status == "correct"), "format": None}
    return {"step": step, "prompt": f"prompt {step}", "completion": text, "advantage": -0.5,
            "rewards": rewards, "status": status}  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(each) + "\n" for each in rows)


@pytest.fixture
def run(tmp_path):
    rows = [row(step, i, "correct" if i == step % 4 else "wrong") for step in (5, 10, 15) for i in range(4)]
    (tmp_path / "config.yaml").write_text("task: rlvr\n")
    (tmp_path / "completions.jsonl").write_text(lines(*rows) + '{"step": 20, "comp')
    return RunDirectory(tmp_path)


def texts(rows):
    return [each["completion"] for each in rows]


def test_the_newest(run):
    assert texts(newest(run)) == [f"text 15.{i}" for i in range(4)]
    assert texts(newest(run, count=2)) == ["text 15.2", "text 15.3"]
    assert texts(newest(run, count=2, status="correct")) == ["text 10.2", "text 15.3"]
    assert newest(run, status="timeout") == []


def test_those_of_a_step(run):
    assert texts(at_step(run, 10, count=2)) == ["text 10.0", "text 10.1"]
    assert texts(at_step(run, 0, count=1)) == ["text 5.0"]
    assert texts(at_step(run, 13, status="correct")) == ["text 15.3"]


def test_without_files(tmp_path):
    run = RunDirectory(tmp_path)
    assert newest(run) == at_step(run, 3) == held_out(run) == []


def test_held_out(run):
    problems = [
        {"prompt": f"p{i}", "samples": [{"text": "a", "status": "wrong", "score": 0.0},
                                        {"text": "b", "status": "correct", "score": 1.0}]}
        for i in range(3)
    ]  # fmt: skip
    run.evaluation.write_text(json.dumps({"before": None, "after": {"problems": problems}}))
    assert texts(held_out(run, count=2)) == ["a", "a"]
    assert texts(held_out(run, count=9, status="correct")) == ["b", "b", "b"]
    run.evaluation.write_text(json.dumps({"after": {"problems": [1, {"samples": 3}, {"samples": [4]}]}}))
    assert texts(held_out(run)) == [None]


def printed(*rows, **options):
    out = io.StringIO()
    print_samples(rows, Console(file=out, width=60, highlight=False), **options)
    return out.getvalue()


def test_a_block():
    shown = printed(row(15, 3, "correct", "first\nsecond [bold]line[/bold]"))
    assert shown == (
        "step 15  correct  verifier 1  format -  advantage -0.5\n"
        "  prompt  prompt 15\n"
        "  answer  first\n"
        "          second [bold]line[/bold]\n"
        "\n"
    )


def test_colours_follow_the_verdict():
    def coloured(status):
        out = io.StringIO()
        print_samples([row(1, 1, status)], Console(file=out, force_terminal=True, color_system="standard"))
        return out.getvalue()

    assert "\x1b[32mtext 1.1" in coloured("correct")
    assert "\x1b[31mtext 1.1" in coloured("wrong")
    assert "\x1b[33mtext 1.1" in coloured("unparseable")


def test_a_terminal_obeys_no_completion():
    shown = printed(row(1, 1, completion="a\x1b[2Jb\x07c\u202ed\ud800e\r\nf"))
    assert "a\\u001b[2Jb\\u0007c\\u202ed\\ud800e\n" in shown
    assert "\x1b" not in shown


def test_what_cannot_be_seen_is_spelled_out():
    hidden = "a\u200bb\u200ec\u2028d\ufeffe\U000e0041f\u2066g\x9bh\x85i"
    shown = printed(row(1, 1, completion=hidden))
    assert "a\\u200bb\\u200ec\\u2028d\\ufeffe\\U000e0041f\\u2066g\\u009bh\\u0085i\n" in shown
    kept = "你好 עברית नमस्ते می\u200cخواهم 👩\u200d💻 end"
    assert kept in printed(row(1, 1, completion=kept))


@pytest.mark.parametrize("length", [9, 11, 60])
def test_on_a_terminal_long_lines_are_wrapped_beneath_their_beginning(length):
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system=None, highlight=False)
    words = " ".join(["word", "x" * length, "漢字" * 20, "[bold]", "end"])
    print_samples([row(1, 1, completion=f"{words}\n\n  indented")], console)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    answer = plain[plain.index("  answer  word") :].splitlines()
    assert all(cell_len(line) <= 40 for line in answer)
    assert {line[:10] for line in answer[1:]} <= {" " * 10, ""}
    assert "".join(line[10:] for line in answer).replace(" ", "") == words.replace(" ", "") + "indented"
    assert answer[-2].rstrip() == "            indented"


def test_long_texts_lose_their_middle():
    long = "a" * LENGTH + "b" * LENGTH
    assert f"a [... {LENGTH:,} characters, --full shows them ...] b" in printed(row(1, 1, completion=long))
    assert long in printed(row(1, 1, completion=long), full=True)


def test_conversations_and_other_things():
    shown = printed({"prompt": [{"role": "user", "content": "hi"}, 3], "completion": None, "rewards": 7})
    assert "[user] hi" in shown
    assert "answer  (empty)" in shown


def test_following_a_run(run):
    """Half a line waits for its other half; a file that is written anew does not repeat itself."""
    run.completions.write_text(lines(row(5, 0)))
    tail = lines(row(15, 0, "correct"))
    steps = [
        lambda: run.completions.open("a").write(lines(row(10, 0), row(10, 1)) + tail[:20]),
        lambda: run.completions.open("a").write(tail[20:]),
        lambda: (
            run.completions.unlink(),
            run.completions.write_text(lines(row(5, 0), row(10, 0), row(15, 0))),
        ),
        lambda: run.completions.open("a").write("damaged\n" + lines(row(20, 0))),
    ]
    left = iter(steps)

    def wait(seconds):
        next(left)()

    asked = iter([True] * len(steps) + [False])
    assert texts(follow(run, lambda: next(asked), wait=wait)) == [
        "text 10.0",
        "text 10.1",
        "text 15.0",
        "text 20.0",
    ]


def test_following_starts_before_the_file_exists(tmp_path):
    run = RunDirectory(tmp_path)
    asked = iter([True, False])
    found = follow(run, lambda: next(asked), wait=lambda s: run.completions.write_text(lines(row(5, 0))))
    assert texts(found) == ["text 5.0"]


def command(*arguments, code=0):
    done = CliRunner().invoke(app, ["samples", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_the_command(run, tmp_path):
    assert command(run.root).stdout.count("step 15") == 4
    assert texts(json.loads(command(run.root, "--json", "-n", 1).stdout)) == ["text 15.3"]
    # nobody holds the folder: nothing more will come
    assert command(run.root, "--follow").stdout.count("step 15") == 4
    assert [json.loads(line)["step"] for line in command(run.root, "-f", "--json").stdout.splitlines()] == [
        15
    ] * 4
    run.completions.write_text(lines(row(1, 0, completion="\ud800")).replace("-0.5", "NaN"))
    assert json.loads(command(run.root, "--json").stdout)[0] | {"advantage": None} == row(
        1, 0, completion="\ud800"
    ) | {"advantage": None}
    assert "no timeout completions" in command(run.root, "--only", "timeout").stderr
    assert "found 'wrnog'" in command(run.root, "--only", "wrnog", code=2).stderr
    command(run.root, "--follow", "--step", 3, code=2)
    assert "no run directory" in command(tmp_path / "nowhere", code=2).stderr
