"""The pool with verifiers that loop, die, flood and hide: exact counts, no item lost, nothing left behind."""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posttrain.rewards.pool import VerifierPool, VerifierStartError
from posttrain.rewards.registry import VerifierSpec

MISBEHAVE = """
import ctypes, os, re, signal, subprocess, sys, time

def act(prompts, completions, **columns):
    text = completions[0]
    if text == "loop":
        while True: pass
    if text == "sleep": time.sleep(60)
    if text == "regex": re.match(r"(a+)+$", "a" * 60 + "b")
    if text == "exit": os._exit(3)
    if text == "sysexit": sys.exit(4)
    if text == "segfault": ctypes.string_at(0)
    if text == "recursion":
        sys.setrecursionlimit(10**9)
        nested = []
        for _ in range(10**6): nested = [nested]
        repr(nested)
    if text == "memory": bytearray(8 * 2**30)
    if text == "raise": raise KeyError("lost")
    if text == "unprintable":
        class Odd(Exception):
            def __str__(self): raise OSError
        raise Odd
    if text == "spam":
        for _ in range(2000): print("x" * 200)
        os.write(1, b"done 0 [1]\\n" * 10)
    if text == "stdin": return [1.0 if sys.stdin.read() == "" else 0.0]
    if text == "close": os.closerange(3, 64); time.sleep(60)
    if text == "alarm": signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(0)
    if text.startswith("child "):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        open(text[6:], "w").write(str(child.pid))
        while True: pass
    if text.startswith("pid "):
        open(text[4:], "w").write(str(os.getpid()))
        while True: pass
    if text == "none": return [None]
    if text == "nan": return [float("nan")]
    if text == "short": return []
    if text == "word": return ["1"]
    return [float(len(text))]
"""


@pytest.fixture(scope="module", autouse=True)
def misbehave(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user_code")
    (folder / "misbehave_for_tests.py").write_text(MISBEHAVE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


SPEC = VerifierSpec("python:misbehave_for_tests.act")


def judge(texts, **options):
    options = {"deadline": 0.5} | options
    with VerifierPool(SPEC, **options) as pool:
        return pool.verify(texts, [{}] * len(texts)), pool


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_gone(pid, seconds=20.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def wait_text(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("loop", "timeout", "deadline of 0.5 s"),
        ("sleep", "timeout", "deadline of 0.5 s"),
        ("regex", "timeout", "deadline of 0.5 s"),
        ("exit", "error", "exit code 3"),
        ("sysexit", "error", "SystemExit: 4"),
        ("segfault", "error", "SIGSEGV"),
        ("recursion", "error", "SIGSEGV"),
        ("memory", "error", "MemoryError"),
        ("raise", "error", "KeyError: 'lost'"),
        ("unprintable", "error", "Odd: (its message raised OSError)"),
        ("close", "error", "died"),
        ("nan", "error", "finite"),
        ("short", "error", "list of 0"),
        ("word", "error", "found str"),
        ("none", "skipped", "None"),
    ],
)
def test_one_bad_item_gets_its_own_verdict_and_harms_no_other(text, status, message):
    verdicts, _ = judge(["a", text, "bbb"], deadline=0.5 if status == "timeout" else 30.0)
    assert [v.status for v in verdicts] == ["correct", status, "correct"]
    assert [v.score for v in verdicts] == [1.0, None, 3.0]
    assert message in verdicts[1].message


def test_spam_and_stdin_do_not_reach_the_protocol():
    verdicts, pool = judge(["spam", "stdin", "a"], deadline=20)
    assert [v.score for v in verdicts] == [4.0, 1.0, 1.0]
    assert pool.restarts == 0


def test_an_ignored_alarm_does_not_lift_the_deadline():
    verdicts, _ = judge(["alarm", "loop", "a"])
    assert [v.status for v in verdicts] == ["correct", "timeout", "correct"]


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_are_exact_in_a_mixed_batch(workers):
    bad = {3: "timeout", 7: "error", 8: "timeout", 20: "error", 299: "timeout"}
    kinds = {"timeout": "loop", "error": "exit"}
    texts = [kinds[bad[i]] if i in bad else "x" * (i % 5) for i in range(300)]
    verdicts, pool = judge(texts, deadline=0.3, workers=workers)
    for i, verdict in enumerate(verdicts):
        expected = bad.get(i) or ("correct" if i % 5 else "wrong")
        assert (i, verdict.status) == (i, expected)
        assert verdict.score == (None if i in bad else float(i % 5))
    assert pool.restarts == 5


def test_the_deadline_is_per_item_and_does_not_count_waiting_or_starting():
    # 20 items of 0.1 s take 2 s, twice the deadline of each
    with VerifierPool(VerifierSpec("python:slow_for_tests.act"), deadline=1.0) as pool:
        verdicts = pool.verify(["x"] * 20, [{}] * 20)
    assert [v.status for v in verdicts] == ["correct"] * 20


@pytest.fixture(scope="module", autouse=True)
def slow(misbehave):
    (misbehave / "slow_for_tests.py").write_text(
        "import time\ntime.sleep(1.5)\ndef act(prompts, completions):\n    time.sleep(0.1)\n    "
        "return [1.0]\n"
    )


def test_odd_text_survives_the_protocol(misbehave):
    (misbehave / "echo_for_tests.py").write_text(
        "import hashlib\n"
        "def act(prompts, completions, digest):\n"
        "    data = completions[0].encode('utf-8', 'surrogatepass')\n"
        "    return [1.0 if hashlib.sha256(data).hexdigest() == digest[0] else 0.0]\n"
    )
    texts = ["", "\0a\0", "\ud800 half", "line\nbreak\r\n\u2028", '"}\\', "héß\U0001f600", "z" * 20_000_000]
    digests = [hashlib.sha256(t.encode("utf-8", "surrogatepass")).hexdigest() for t in texts]
    with VerifierPool(VerifierSpec("python:echo_for_tests.act"), deadline=30) as pool:
        verdicts = pool.verify(texts, [{"digest": d, "unused": 1} for d in digests])
    assert [v.status for v in verdicts] == ["correct"] * len(texts)


def test_an_item_too_large_for_the_memory_limit_is_an_error_and_the_rest_goes_on():
    verdicts, _ = judge(["a", "y" * 300_000_000, "bb"], memory_gib=0.5, deadline=30)
    assert [v.status for v in verdicts] == ["correct", "error", "correct"]
    assert [v.score for v in verdicts] == [1.0, None, 2.0]


def test_programs_started_by_a_verifier_die_with_it(tmp_path):
    verdicts, _ = judge([f"child {tmp_path / 'pid'}"], deadline=3)
    assert verdicts[0].status == "timeout"
    assert wait_gone(int((tmp_path / "pid").read_text()))


def test_close_garbage_collection_and_interrupt_leave_no_process(monkeypatch):
    pools = [VerifierPool(SPEC, deadline=5) for _ in range(3)]
    pids = []
    for pool in pools:
        pool.wait_ready()
        pids += [slot.process.pid for slot in pool._slots]
    pools[0].close()
    pools[0].close()
    monkeypatch.setattr(pools[1], "_wait", lambda now: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pools[1].verify(["loop"], [{}])
    del pool, pools[2]
    gc.collect()
    for pid in pids:
        with pytest.raises(ChildProcessError):  # reaped: not even a zombie is left
            os.waitpid(pid, os.WNOHANG)
    monkeypatch.undo()
    assert pools[0]._closed
    with pytest.raises(RuntimeError, match="closed"):
        pools[0].verify(["a"], [{}])
    # an interrupted pool starts afresh
    assert [v.score for v in pools[1].verify(["aa"], [{}])] == [2.0]
    pools[1].close()


@pytest.mark.parametrize("text", ["pid", "regex"])
def test_workers_die_when_the_parent_is_killed(misbehave, tmp_path, text):
    # the regular expression holds the interpreter lock, so there only the worker's own alarm can act
    script = tmp_path / "parent.py"
    item = "regex" if text == "regex" else f"pid {tmp_path / 'pid'}"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(misbehave)!r})
        from posttrain.rewards.pool import VerifierPool
        from posttrain.rewards.registry import VerifierSpec

        class Telling(VerifierPool):
            def _wait(self, now):
                if self._slots[0].started is not None:
                    print(self._slots[0].process.pid, flush=True)
                return super()._wait(now)

        deadline = {60 if text == "pid" else 1}
        pool = Telling(VerifierSpec("python:misbehave_for_tests.act"), deadline=deadline)
        pool.verify([{item!r}], [{{}}])
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    if text == "pid":
        assert int(wait_text(tmp_path / "pid")) == worker
    else:
        time.sleep(0.3)  # let it get from the start mark into the regular expression
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert wait_gone(worker, 30)


def test_a_script_without_a_main_guard_can_use_the_pool(tmp_path):
    script = tmp_path / "bare.py"
    script.write_text(
        "from posttrain.rewards.pool import VerifierPool\n"
        "from posttrain.rewards.registry import VerifierSpec\n"
        "pool = VerifierPool(VerifierSpec('format', {'pattern': 'a+'}))\n"
        "print([v.status for v in pool.verify(['aa', 'b'], [{}, {}])])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines() == ["['correct', 'wrong']"], done.stderr


def test_workers_and_pool_do_not_import_torch(misbehave):
    (misbehave / "imports_for_tests.py").write_text(
        "import sys\n"
        "def act(prompts, completions):\n"
        "    return [float(any(m in sys.modules for m in ('torch', 'datasets', 'transformers')))]\n"
    )
    with VerifierPool(VerifierSpec("python:imports_for_tests.act")) as pool:
        assert pool.verify(["a"], [{}])[0].score == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (VerifierSpec("python:no_such_module_here.act"), "cannot import 'no_such_module_here'"),
        (VerifierSpec("python:misbehave_for_tests.akt"), "did you mean 'act'"),
        (VerifierSpec("python:needs_state_for_tests.act"), "trainer_state"),
        (VerifierSpec("format", {"pattern": "(a"}), "not a regular expression"),
        (VerifierSpec("reasoning_gym", {"task": "chain_sun"}), "chain_sun"),
    ],
)
def test_a_verifier_that_cannot_start_says_why(misbehave, spec, message):
    (misbehave / "needs_state_for_tests.py").write_text(
        "def act(prompts, completions, trainer_state): return [1.0]\n"
    )
    with pytest.raises(VerifierStartError, match=message), VerifierPool(spec) as pool:
        pool.wait_ready()


def test_a_verifier_that_never_gets_ready_is_reported(misbehave):
    (misbehave / "stuck_for_tests.py").write_text("import time\ntime.sleep(600)\n")
    with (
        pytest.raises(VerifierStartError, match=r"not ready after 1\.5 s"),
        VerifierPool(VerifierSpec("python:stuck_for_tests.act"), start_timeout=1.5) as pool,
    ):
        pool.verify(["a"], [{}])


def test_an_unserialisable_column_is_named():
    row = {"when": datetime.datetime(2026, 1, 1)}
    with VerifierPool(SPEC) as pool, pytest.raises(TypeError, match=r"'when': 'datetime'"):
        pool.verify(["a"], [row])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (VerifierSpec("mathh"), r"did you mean 'math'"),
        (VerifierSpec("math", {"golt": "x"}), r"did you mean 'gold'"),
        (VerifierSpec("math", {"extract": "box"}), r"extract: Input should be"),
        (VerifierSpec("expression", {"nums": 3}), r"nums: Input should be a valid string"),
        (VerifierSpec("python:act"), r"package\.module\.function"),
    ],
)
def test_wrong_names_and_parameters_are_refused_before_anything_starts(spec, message):
    with pytest.raises(ValueError, match=message):
        VerifierPool(spec)


def test_rows_and_completions_must_pair_up_and_an_empty_batch_is_empty():
    with VerifierPool(SPEC) as pool:
        with pytest.raises(ValueError, match="2 completions and 1 rows"):
            pool.verify(["a", "b"], [{}])
        assert pool.verify([], []) == []
