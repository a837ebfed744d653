"""What is written appears whole or not at all, and never takes the place of a link, a pipe or a device."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import torch
from safetensors.torch import load

from posttrain.run.directory import write_text
from posttrain.selection.delta_file import save_tensors
from posttrain.stored import finished_file


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made" / "a"
    with finished_file(path) as partial:
        partial.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"

    def stopped() -> None:
        with finished_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("a", "new")]


def test_a_folder_stays(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
    assert list(tmp_path.parent.glob("*.partial")) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays(tmp_path, there):
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_link_to_itself_is_said(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "loop", "x")
    assert (tmp_path / "loop").is_symlink()


def test_a_pipe_gets_the_finished_content(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def received(write) -> bytes:
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
        reader.start()
        write()
        reader.join(60)
        return got[0]

    assert received(lambda: write_text(pipe, "text")) == b"text"

    def tensors() -> None:
        with finished_file(pipe) as partial:  # safetensors itself renames a file over what it is given
            save_tensors({"a": torch.arange(3)}, partial, {})

    assert torch.equal(load(received(tensors))["a"], torch.arange(3))
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
