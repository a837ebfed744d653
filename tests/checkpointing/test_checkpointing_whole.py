"""A checkpoint that is not as it was written is named, not gone on from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from safetensors.numpy import save_file

from posttrain import SFTTrainer
from posttrain.checkpointing.resume import CheckpointError
from posttrain.checkpointing.whole import FILES, damage, list_files, refusal


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir()
    save_file({"w": np.ones(64, np.float32)}, folder / "model.safetensors")
    torch.save({"state": torch.ones(64)}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "README.md").write_text("card")
    list_files(folder)
    return folder


def test_a_whole_one_may_have_other_cards_and_configurations(tmp_path):
    folder = checkpoint(tmp_path, 2)
    (folder / "README.md").write_text("another card")
    (folder / "zero_to_fp32.py").write_text("")
    assert damage(folder) is None
    assert damage(folder, deep=True) is None


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", FILES])
@pytest.mark.parametrize("kind", ["half", "empty", "other bytes", "other JSON", "folder", "gone"])
def test_a_damaged_file_is_named(tmp_path, name, kind, listed):
    folder = checkpoint(tmp_path, 2)
    path = folder / name
    data = path.read_bytes()
    if not listed:
        (folder / FILES).unlink()
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(
            {"half": data[:-9], "empty": b"", "other bytes": b"\xcd" * len(data), "other JSON": b"[]"}[kind]
        )
    found = damage(folder)
    if (name == FILES or not listed) and kind in ("gone", "folder") and "trainer_state" not in name:
        assert found is None or name in found  # as in a checkpoint of plain TRL
    else:
        assert found is not None
        assert found.startswith(name)


def test_changed_bytes_are_found_where_loading_failed(tmp_path):
    folder = checkpoint(tmp_path, 2)
    path = folder / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[data.index(b"\0\0\x80\x3f" * 9)] ^= 1
    path.write_bytes(data)
    assert damage(folder) is None
    assert "optimizer.pt cannot be read: the checksum" in str(damage(folder, deep=True))


def test_the_way_on_is_the_newest_other_whole_one(tmp_path):
    one, two, three = (checkpoint(tmp_path, step) for step in (2, 4, 6))
    assert "goes on from checkpoint-4" in refusal(three, "x")
    (two / "optimizer.pt").unlink()
    assert "goes on from checkpoint-2" in refusal(three, "x")
    (one / "optimizer.pt").unlink()
    assert "starts at step 0" in refusal(three, "x")


def test_a_trainer_does_not_begin_an_optimiser_anew(tmp_path):
    def trainer(steps):
        return SFTTrainer(
            model=support.model(),
            args=support.sft_config(tmp_path, max_steps=steps, save_strategy="steps", save_steps=1),
            train_dataset=support.answers(),
            processing_class=support.tokenizer(),
        )

    trainer(1).train()
    path = tmp_path / "checkpoint-1" / "optimizer.pt"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is damaged.*: optimizer\.pt is missing"):
        trainer(2).train(resume_from_checkpoint=True)
    start = data.index(b"optimizer/data.pkl") + len("optimizer/data.pkl")
    path.write_bytes(
        data[:start] + bytes(byte ^ 0x55 for byte in data[start : start + 400]) + data[start + 400 :]
    )
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read: the checksum"):
        trainer(2).train(resume_from_checkpoint=True)
    path.write_bytes(data)
    trainer(2).train(resume_from_checkpoint=True)
