"""How the page looks in a real browser: both colour schemes, a telephone, paper: nothing cut or pale."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from report_runs import make_run

from posttrain.report import write_report

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("chromium", ROOT / "scripts" / "chromium.py")
chromium = sys.modules["chromium"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chromium)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        chromium.installed() is None, reason=f"no browser on the PATH: {', '.join(chromium.NAMES)}"
    ),
]

LONG = "a_very_long_name_without_any_place_to_break_it_" * 6

# the ratio of WCAG 2 between each text and what is painted behind it; translucent layers are blended
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = css => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const pale = new Set(); let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement, style = getComputedStyle(element);
    if (!walk.currentNode.data.trim() || !element.checkVisibility()) continue;
    const back = behind(element), ink = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(over(rgba(ink), back)), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05); seen++;
    if (ratio < 4.5) pale.add(`${element.tagName}.${element.getAttribute('class')}: ${ratio.toFixed(2)}`);
  }
  return {seen, pale: [...pale], paper: light(rgba(getComputedStyle(document.body).backgroundColor))};
})()
"""
# what sticks out of the page, except inside boxes that scroll
OVERFLOW = """
[...document.querySelectorAll('body *')].filter(e => !e.parentElement.closest('.scroll, pre, .text, svg')
  && e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1 && !e.matches('.theme input'))
  .map(e => `${e.tagName}.${e.getAttribute('class')}`)
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of an RLVR, a preference and a supervised run, and of three runs."""
    folder = tmp_path_factory.mktemp("look")
    runs = [make_run(folder / name, after=after) for name, after in
            (("ace", None), ("plain", [1, 1, 2, 2] * 5), (LONG[:120], [4, 4, 4, 4] * 5))]  # fmt: skip
    rows = [{"step": 40 + step, "prompt": LONG, "completion": LONG + "\nline\n" * 40, "status": "correct",
             "rewards": {LONG: 1.0}, "advantage": 1.0} for step in range(3)]  # fmt: skip
    with (runs[0] / "completions.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    masks = [
        {"method": "sparse_po", "title": "chosen", "tokens": list("abc"), "values": {"reward": [0, 1, 2]}}
    ]
    (runs[0] / "mask_examples.json").write_text(json.dumps({"pictures": masks}))
    logs = [
        {"step": step, "reward": 1.0, "loss": 0.1, "frac_reward_zero_std": 1.0, "entropy": 0.01}
        for step in range(1, 41)
    ]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    (runs[1] / "config.yaml").write_text(yaml.safe_dump({"task": "rlvr", "methods": {"aepo": {LONG: LONG}}}))
    pairs = make_run(folder / "pairs")
    (pairs / "config.yaml").write_text("task: preference\nmethods: {rpo: {eta: 0.1}}\n")
    logs = [
        {
            "step": step, "loss": 0.5, "rewards/margins": step, "rewards/accuracies": 0.5,
            "shift/chosen": -step, "shift/rejected": -2 * step, "rpo/nll": step,
        }
        for step in range(1, 9)
    ]  # fmt: skip
    (pairs / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    plain = make_run(folder / "sft")
    (plain / "config.yaml").write_text("task: sft\nevaluate: null\n")
    for name in ("completions.jsonl", "evaluation.json"):
        (plain / name).unlink()
    return {
        "rlvr": write_report(runs[0]),
        "alarms": write_report(runs[1]),
        "preference": write_report(pairs),
        "sft": write_report(plain),
        "three": write_report(runs, folder / "three.html"),
    }


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as found:
        yield found


@pytest.mark.parametrize("name", ["rlvr", "alarms", "preference", "sft", "three"])
def test_nothing_is_pale_cut_or_fetched(pages, browser, name):
    for scheme in ("light", "dark"):
        for width in (400, 1200):
            where = (name, scheme, width)
            browser.open(pages[name], width=width, scheme=scheme)
            browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.run(OVERFLOW) == [], where
            assert browser.run("document.documentElement.scrollWidth") <= width, where
            found = browser.run(CONTRAST)
            assert found["seen"] > 50, where
            assert found["pale"] == [], where
            assert (found["paper"] > 0.5) == (scheme == "light"), where
            assert browser.messages == [], where
            assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == [], where


def test_the_reader_may_choose_the_colours(pages, browser):
    for scheme, chosen in (("light", "dark"), ("dark", "light")):
        browser.open(pages["rlvr"], scheme=scheme)
        browser.run(f"document.querySelector('#theme-{chosen}').click()")
        found = browser.run(CONTRAST)
        assert (found["paper"] > 0.5) == (chosen == "light")
        assert found["pale"] == []


@pytest.mark.parametrize("name", ["rlvr", "three"])
def test_paper(pages, browser, name):
    # 182 mm between the margins of A4
    browser.open(pages[name], width=688, scheme="dark", media="print")
    found = browser.run(CONTRAST)
    assert found["pale"] == []
    assert found["paper"] == 1.0
    assert browser.run(OVERFLOW) == []
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > innerWidth + 1)"
    assert browser.run(f"{cut}.map(e => e.innerText)") == []
    assert not browser.run("document.querySelector('nav').checkVisibility()")
    whole = "getComputedStyle(document.querySelector('figure')).breakInside"
    assert browser.run(whole) == "avoid"
    assert browser.pdf().startswith(b"%PDF")


def test_the_checks_themselves_find_what_is_wrong(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text(
        "<body style='background:#fff'><p class=x style='color:#999'>pale</p>"
        "<div style='width:2000px'>wide</div><img src='http://example.invalid/a.png'>"
        "<script>console.error('oops'); nowhere()</script>"
    )
    browser.open(page, width=400)
    assert browser.run(CONTRAST)["pale"] == ["P.x: 2.85"]
    assert browser.run(OVERFLOW) == ["DIV.null"]
    assert "http://example.invalid/a.png" in browser.requests
    assert any("oops" in message for message in browser.messages)
    assert any("Uncaught" in message for message in browser.messages)
