"""How a watch ends: nothing of it may be inside the store when the interpreter goes."""

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from posttrain.watchdog import Limits, watching


class SlowStore:
    """A store whose calls take their time, as those of a busy machine or a far one do."""

    def __init__(self, store):
        self.store = store

    def set(self, key, value):
        time.sleep(0.5)
        self.store.set(key, value)

    def __getattr__(self, name):
        return getattr(self.store, name)


def test_no_thread_of_a_watch_is_in_the_store_after_it(tmp_path, monkeypatch):
    """A thread that returned from C++ while the interpreter ended aborted the process, with all done."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(master.port))
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: SlowStore(store))
    before = set(threading.enumerate())
    with watching(tmp_path, Limits(), rank=0, world=2, checkpoints=tmp_path, go_on="go on"):
        assert "posttrain-beat" in {thread.name for thread in set(threading.enumerate()) - before}
    assert "posttrain-beat" not in {thread.name for thread in threading.enumerate()}


class SilentStore:
    """A store on a machine that is gone: calls do not come back."""

    called = threading.Event()
    back = threading.Event()

    def __init__(self, prefix, store):
        pass

    def set(self, key, value):
        self.called.set()
        self.back.wait(120)
        raise RuntimeError("gone")


def test_a_store_that_does_not_answer_keeps_no_process(tmp_path, monkeypatch):
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(master.port))
    monkeypatch.setattr("torch.distributed.PrefixStore", SilentStore)
    monkeypatch.setattr("posttrain.watchdog.watch._STORE_SECONDS", 0.2)
    with (
        pytest.raises(ZeroDivisionError),
        watching(tmp_path, Limits(), rank=0, world=2, checkpoints=tmp_path, go_on="go on"),
    ):
        _ = SilentStore.called.wait(20) / 0
    asking = [thread for thread in threading.enumerate() if thread.name == "posttrain-beat"]
    assert asking  # the watch was left although its thread was still in the store
    SilentStore.back.set()
    for thread in asking:
        thread.join(20)
        assert not thread.is_alive()
