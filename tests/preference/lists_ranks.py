"""Run by test_preference_lists_ranks.py under one or several processes."""

import json
import sys
from pathlib import Path

import pairs
import support
import torch
from datasets import Dataset

from posttrain.preference.lipo import LiPO


def main(out: str, per_device: int, forward_rows: int | None, precompute: bool) -> None:
    torch.set_num_threads(1)
    folder = Path(out).parent
    # with files, so that ranks share the cache of the reference
    data, held_out = (Dataset.from_json(str(folder / name), cache_dir=str(folder)) for name in ("a", "b"))
    run = pairs.trainer(
        folder,
        methods=[LiPO(forward_rows=forward_rows)],
        data=data,
        eval_data=held_out,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=per_device // 2,
        reference=support.model(seed=1),
        precompute_ref_log_probs=precompute,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=2,
        max_steps=2,
        beta=0.3,
    )
    logs = pairs.history(run)
    if run.accelerator.is_main_process:
        weights = {name: value.double().sum().item() for name, value in run.model.state_dict().items()}
        Path(out).write_text(json.dumps({"logs": logs, "weights": weights}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, bool(int(sys.argv[4])))
    support.leave()
