"""The page: right numbers, nothing from outside, nothing lost when files are missing or broken."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from report_runs import HOSTILE, evaluation, make_run

from posttrain.report import write_report

VOID = {"input", "meta", "link", "br", "img", "circle", "path", "line"}


class Page(HTMLParser):
    """Collects text by element and every attribute; refuses unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.cells: list[list[str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th") and self.cells:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)
            if self.cells and self.cells[-1] and ("td" in self.open or "th" in self.open):
                self.cells[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def row(self, *start: str) -> list[str]:
        rows = [[" ".join(cell.split()) for cell in row] for row in self.cells]
        return next(row for row in rows if row[: len(start)] == list(start))

    def values(self, attribute: str) -> list[str]:
        return [value or "" for _, name, value in self.attributes if name == attribute]


def page(run: Path | list[Path], **options: Path) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


def test_headline_and_table_have_the_numbers_of_the_evaluation(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    # pass@1: (0+1+2+2)/16 before, (2+3+4+3)/16 after
    assert "Held-out pass@1 went from 0.312 to 0.750: +0.438, 90 % interval [" in found.text
    assert "The interval excludes zero: a rise." in found.text
    parts = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for name in ("pass@1", "pass@2", "maj@2"):
        cells = found.row(name)
        for cell, part in zip(cells[1:4], ("before", "after", "difference"), strict=True):
            estimate = parts[part]["metrics"][name]
            numbers = [float(x.replace("−", "-")) for x in re.findall(r"[−+]?\d\.\d+", cell)]
            assert numbers == pytest.approx([estimate["value"], estimate["low"], estimate["high"]], abs=6e-4)
        assert cells[4] == "▲ excludes zero"
        assert cells[5] == "20"
    assert found.row("distinct-1")[1:4] == ["0.125", "0.125", "–"]
    assert found.row("correct")[1:] == ["25 31.2 %", "60 75.0 %"]
    assert found.row("timeout")[1:] == ["0 0.0 %", "0 0.0 %"]
    assert "5 newly solved, 0 lost" in found.text
    assert found.row("problem 0")[1:4] == ["c", "0/4", "2/4"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([2, 3, 1, 2], [2, 1, 3, 2], "no change can be claimed"),
        ([4, 3, 4, 4] * 3, [1, 0, 1, 0] * 3, "a fall."),
    ],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, before: list, after: list, words: str) -> None:
    assert words in page(make_run(tmp_path / "run", before=before, after=after)).text


def test_a_score_that_never_solves_is_the_headline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    parts = json.loads((run / "evaluation.json").read_text())
    for side in ("before", "after"):
        for name in ("coverage", "pass@1", "pass@2"):
            parts[side]["metrics"][name].update(value=0.0, low=0.0, high=0.0)
    (run / "evaluation.json").write_text(json.dumps(parts))
    assert "Held-out mean score went from 0.312 to 0.750" in page(run).text


def test_every_logged_number_has_its_place(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    labels = [value for value in found.values("aria-label") if ":" in value]
    reward = next(label for label in labels if label.startswith("Reward. "))
    assert reward == "Reward. run: from 0.025 at step 1 to 0.75 at step 30; lowest 0.025, highest 0.75."
    assert any(label.startswith("shift_mean. run: from −0.01 at step 1 to −0.3") for label in labels)
    assert any(
        label.startswith("Loss. run: from 2 at step 1 to 1 at step 2") for label in labels
    )  # warm start
    assert "Method: ace" in found.text
    assert "Constant throughout: verifier/verifier/timeout = 0" in found.text
    assert "training 4 min 10 s" in found.text
    assert "posttrain train 'my config.yaml'" in found.text
    assert found.row("adapter_model.safetensors")[1] == "2.0 KiB"
    assert "Not in this report" not in found.text
    assert "Before believing" not in found.text


def preference_logs(fall: float) -> list[dict]:
    return [
        {
            "step": step, "loss": 0.7, "rewards/accuracies": 0.5, "rewards/margins": step / 10,
            "rewards/chosen": -step / 10, "rewards/rejected": -step / 5,
            "logps/chosen": -50 - fall * step, "logps/rejected": -50 - 2 * fall * step,
            "shift/chosen": -fall * step, "shift/rejected": -2 * fall * step, "shift/both_declined": step / 9,
            "saturated": 0.0, "probe/kl_forward": step / 100, "eval_shift/chosen": -fall * step,
            "eval_shift/rejected": -2 * fall * step, "eval_rewards/margins": step / 11, "rpo/nll": 50 + step,
        }
        for step in range(1, 9)
    ]  # fmt: skip


def test_both_answers_of_a_pair_share_a_chart(tmp_path: Path) -> None:
    runs = []
    for name, fall in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("task: preference\nmethods: {rpo: {eta: 0.01}}\n")
        lines = "".join(json.dumps(row) + "\n" for row in preference_logs(fall))
        (tmp_path / name / "metrics.jsonl").write_text(lines)
        runs.append(tmp_path / name)
    found = page(runs[0])
    labels = [value for value in found.values("aria-label") if ":" in value]
    assert any(
        label.startswith("Log-ratio to the reference (nats). a chosen: from −1 at step 1 to −8 at step 8")
        and "a rejected: from −2 at step 1 to −16 at step 8" in label
        for label in labels
    )
    for title in (
        "Preference accuracy",
        "Reward margin, chosen minus rejected",
        "Log-likelihood of an answer (nats): chosen, rejected dashed",
        "Likelihoods of the pairs",
        "probe/kl_forward",
        "Evaluation, during training",
        "Method: rpo",
    ):
        assert title in found.text, title
    for name in ("Method: shift", "Method: probe", "Rewards and verifiers"):
        assert name not in found.text
    both = page(runs).values("aria-label")
    assert any("a chosen: " in label and "b rejected: from −1 " in label for label in both)


def test_completions_are_spread_over_the_run_and_escaped(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    assert HOSTILE in "".join(found.pieces)
    steps = re.findall(r"step (\d+) prompt \1 ", found.text)
    assert steps == ["1", "7", "13", "18", "24", "30"]
    assert found.text.count("wrong verifier 1 advantage −0.5 text 30.") == 3


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "src" not in {name for _, name, _ in found.attributes}
    assert all(value.startswith("#") or value == "data:," for value in found.values("href"))
    style = found.html[found.html.index("<style>") : found.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert any("default-src 'none'" in value for value in found.values("content"))


def test_hostile_text_is_text_wherever_it_stands(tmp_path: Path) -> None:
    name = "<svg onload=alert(1)>\"'&"
    runs = [
        make_run(tmp_path / "a" / name.replace("/", "")),
        make_run(tmp_path / "b" / HOSTILE.replace("/", "")),
    ]
    for run in runs:
        config = {"task": "rlvr", "model": {"path": HOSTILE}, "methods": {name: {HOSTILE: str(run)}}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        logs = [
            {"step": step, "loss": 0.5, f"{name}/{HOSTILE}": step, f"rewards/{HOSTILE}": 1} for step in (1, 2)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
        completion = {
            "step": 1, "prompt": [{"role": HOSTILE, "content": name}], "completion": name,
            "rewards": {HOSTILE: HOSTILE}, "advantage": HOSTILE, "status": f'x" style="{HOSTILE}',
        }  # fmt: skip
        (run / "completions.jsonl").write_text(json.dumps(completion) + "\n")
        (run / "manifest.json").write_text(json.dumps({"command": [HOSTILE], "versions": {name: HOSTILE}}))
        (run / "export" / name).write_text("x")
        (run / "alarms.jsonl").write_text(json.dumps({"name": HOSTILE, "step": 1, "message": HOSTILE}) + "\n")
        data = json.loads((run / "evaluation.json").read_text())
        for side in ("before", "after"):
            data[side]["metrics"][HOSTILE] = data[side]["metrics"]["pass@1"]
            data[side]["verdicts"][HOSTILE] = 3
            data[side]["problems"][0] |= {"prompt": HOSTILE, "gold": name}
        (run / "evaluation.json").write_text(json.dumps(data))
    for found in (page(runs[0]), page(runs[1]), page(runs)):
        assert not {"script", "img"} & set(found.tags)
        assert not [key for _, key, _ in found.attributes if key.startswith("on")]
        assert HOSTILE in "".join(found.pieces)
        assert all(value.startswith(("--m", "flex-grow", "min-width")) for value in found.values("style"))
        assert all(value.startswith("#") or value == "data:," for value in found.values("href"))


def test_sections_can_be_reached_and_charts_have_words(tmp_path: Path) -> None:
    found = page(make_run(tmp_path / "run"))
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in found.values("href") if value.startswith("#")} <= set(ids)
    assert found.tags.count("svg") == sum(
        tag == "svg" and name == "aria-label" for tag, name, _ in found.attributes
    )
    assert found.tags.count("h1") == 1
    assert ("html", "lang", "en") in found.attributes


def test_a_killed_run_says_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: rlvr\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\nnonsense\n'
        '{"step": 3, "loss": 0.25}\n{"step": 4, "lo'
    )
    found = page(run)
    for sentence in (
        "manifest.json is missing.",
        "completions.jsonl is missing.",
        "evaluation.json is missing.",
        "metrics.jsonl: the last line is incomplete (stopped while writing); it is left out.",
        "metrics.jsonl: 1 damaged lines are left out (first: line 3).",
        "metrics.jsonl: loss is not a finite number in 1 of 3 logs.",
        "metrics.jsonl has no 'reward'",
        "This run has no evaluation",
        "The manifest does not say which command",
    ):
        assert sentence in found.text
    assert any(
        "Loss. run: from 0.5 at step 1 to 0.25 at step 3" in label for label in found.values("aria-label")
    )


@pytest.mark.parametrize("missing", ["before", "after", "difference"])
def test_half_an_evaluation_is_shown_as_such(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run")
    parts = json.loads((run / "evaluation.json").read_text())
    parts[missing] = None
    (run / "evaluation.json").write_text(json.dumps(parts))
    text = page(run).text
    assert {
        "before": "after training is 0.750 [",
        "after": "before training is 0.312 [",
        "difference": "there is no interval of the change",
    }[missing] in text
    assert {
        "before": "the starting model was not evaluated",
        "after": "the trained model was not evaluated",
        "difference": "The paired difference is missing",
    }[missing] in text


def test_alarms_name_what_spoils_the_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps({"after": evaluation([1, 1, 1], timeouts=2).to_dict()}))
    logs = [{"step": s, "reward": 1.0, "frac_reward_zero_std": 0.9 if s > 15 else 0.0} for s in range(1, 21)]
    logs = [log | {"completions/clipped_ratio": 0.5} for log in logs]
    (run / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    text = page(run).text
    assert "Evaluation after: the verifier failed on 2 of 12 samples (0 errors, 2 timeouts)" in text
    assert "What to try: posttrain samples --held-out --only error shows them" in text
    assert "90% of the groups have equal rewards at a mean reward of 1" in text
    assert "Likely cause: all answers of a group are equally right or equally wrong" in text


def test_several_runs_share_charts_and_a_legend(tmp_path: Path) -> None:
    first = make_run(tmp_path / "ace" / "run")
    second = make_run(tmp_path / "plain" / "run", after=[0, 1, 2, 2] * 5)
    out = write_report([first, second], tmp_path / "both.html")
    found = Page(out.read_text())
    assert found.row("ace/run", "pass@1")[5] == "▲ excludes zero"
    assert found.row("plain/run", "pass@1")[5] == "includes zero"
    reward = next(label for label in found.values("aria-label") if label.startswith("Reward. "))
    assert "ace/run: from 0.025" in reward
    assert "plain/run: from 0.025" in reward
    curve = next(label for label in found.values("aria-label") if label.startswith("Held-out pass@k after"))
    assert "ace/run: from 0.75 at k 1" in curve
    assert "plain/run: from 0.312 at k 1" in curve
    assert write_report([first, second]) == tmp_path / "ace" / "report.html"


def test_what_differs_between_runs_is_shown(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", after=[4, 4, 4, 4] * 5)
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["methods"]["ace"] = {"alpha": 0.5, "c_clip": None}
    config |= {"warm_start": {"size": 5}, "run_dir": "elsewhere"}
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    (second / "manifest.json").write_text(json.dumps({"versions": {"torch": "2.14.0"}}))
    found = page([first, second])
    assert found.row("methods.ace.alpha")[1:] == ["1.0", "0.5"]
    assert found.row("warm_start")[1:] == ["–", '{"size": 5}']
    assert found.row("versions.torch")[1:] == ["2.13.0", "2.14.0"]
    names = [row[0] for row in found.cells]
    assert not {"run_dir", "methods.ace.c_clip", "task"} & set(names)
    assert "What differs" not in page(first).text
    (second / "config.yaml").write_text((first / "config.yaml").read_text())
    (second / "manifest.json").write_text((first / "manifest.json").read_text())
    assert "Configurations, data and versions of these runs are the same." in page([first, second]).text


def test_runs_are_compared_on_the_same_problems(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", after=[4, 4, 4, 4] * 5)
    found = page([first, second])
    header = found.row("metric", "a", "b")
    assert header == ["metric", "a", "b", "b − a"]
    # (4+4+4+4)/16 against (2+3+4+3)/16
    cells = found.row("pass@1", next(c for c in found.row("pass@1") if c.startswith("0.750")))
    assert [cells[2].split()[0], cells[3].split()[0]] == ["1.000", "+0.250"]
    assert cells[3].endswith("▲")
    low, high = (float(value) for value in re.findall(r"[0-9.]+(?=[,\]])", cells[3]))
    assert 0 < low < 0.25 < high
    other = json.loads((second / "evaluation.json").read_text())
    other["after"]["problems"][0]["prompt"] = "another one"
    (second / "evaluation.json").write_text(json.dumps(other))
    found = page([first, second])
    assert "b against a: no difference. They were evaluated on different problems." in found.text
    assert found.row("pass@1", cells[1])[3] == "–"
    other["after"]["settings"]["temperature"] = 0.5
    (second / "evaluation.json").write_text(json.dumps(other))
    assert "evaluate.temperature differs: 1.0 and 0.5." in page([first, second]).text


@pytest.mark.parametrize("seed", range(10))
def test_no_damage_stops_the_page_of_two_runs(tmp_path: Path, seed: int) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    chance = random.Random(seed)
    for name in ("evaluation.json", "manifest.json"):
        data = json.loads((runs[1] / name).read_text())
        (runs[1] / name).write_text(json.dumps(mangled(data, chance, rate=0.02)))
    (runs[1] / "config.yaml").write_text("task: [rlvr]\nmethods: 3\n1: {2: x}\n")
    assert "Repeat these runs" in page(runs).text


def test_a_supervised_run_misses_nothing_that_it_never_had(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("task: sft\nevaluate: null\n")
    for name in ("evaluation.json", "completions.jsonl"):
        (run / name).unlink()
    found = page(run)
    assert "is missing." not in found.text
    assert "#completions" not in found.values("href")
    assert "training loss" in found.text


def test_text_that_html_or_utf8_cannot_hold_is_made_visible(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    messages = [{"role": "user", "content": "two\nlines"}]
    row = {
        "step": 1,
        "prompt": messages,
        "completion": "nul \0 bell \a surrogate \ud83d end",
        "rewards": None,
    }
    (run / "completions.jsonl").write_text(json.dumps(row) + "\n")
    found = page(run)
    assert "user: two\nlines" in "".join(found.pieces)
    assert "nul ␀ bell ␇ surrogate \\ud83d end" in found.text
    assert "\0" not in found.html


def test_what_is_no_run_is_refused_and_the_old_page_stays(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run directory at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds none of config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        write_report([])
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="given twice"):
        write_report([run, run])
    assert write_report(run) == run / "report.html"
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


def mangled(value, chance: random.Random, rate: float):
    """Drop or replace parts of a JSON value at random."""
    if chance.random() < rate:
        return chance.choice([None, "text", 3, -1.5, [], {}, [1], True, float("nan")])
    if isinstance(value, dict):
        return {key: mangled(item, chance, rate) for key, item in value.items() if chance.random() > rate}
    if isinstance(value, list):
        return [mangled(item, chance, rate) for item in value]
    return value


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_inside_valid_json_stops_the_page(tmp_path: Path, seed: int) -> None:
    run = make_run(tmp_path / "run")
    chance = random.Random(seed)
    config = {"task": "rlvr", "model": {"path": "x"}, "data": {}, "methods": {"ace": {}}}
    (run / "config.yaml").write_text(json.dumps(mangled(config, chance, rate=0.06)))
    for name in ("evaluation.json", "manifest.json"):
        data = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(mangled(data, chance, rate=0.06)))
    for name in ("metrics.jsonl", "completions.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        (run / name).write_text("".join(json.dumps(mangled(row, chance, rate=0.06)) + "\n" for row in rows))
    assert "Repeat this run" in page(run).text


def test_masks_over_tokens(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [
        {
            "method": "sparse_po",
            "title": "chosen",
            "tokens": ["a", HOSTILE],
            "values": {"reward": [0.0, 2.0]},
        },
        {"method": "sparse_po", "title": "rejected", "tokens": ["b"], "values": {"reward": [0.5], "kl": [0]}},
        {"method": "sparse_po", "title": "rejected", "tokens": ["b"], "values": {"reward": [0.5, 1.0]}},
    ]
    (run / "mask_examples.json").write_text(json.dumps({"pictures": rows}))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    shares = [value for tag, name, value in page.attributes if tag == "span" and name == "style"]
    assert [share for share in shares if share.startswith("--m")] == [
        "--m:0.000", "--m:1.000", "--m:0.250", "--m:0.000",
    ]  # fmt: skip
    assert "sparse_po: reward, chosen response" in page.text
    assert "mask_examples.json: 1 of 3 are damaged." in page.text
    (run / "mask_examples.json").unlink()
    assert "Masks over tokens" not in Page(write_report(run).read_text(encoding="utf-8")).text
