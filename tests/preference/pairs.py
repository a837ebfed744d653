"""Pairs and a DPO trainer of toy size, shared by the tests of preference methods."""

from __future__ import annotations

from typing import Any

import support
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig
from trl import DPOTrainer as TRLDPOTrainer

from posttrain import DPOTrainer
from posttrain.preference.method import Batch
from posttrain.rl.gauges import Gauges


def rows(count: int = 16, **columns: Any) -> Dataset:
    """Pairs of different lengths."""
    return Dataset.from_dict(
        {
            "prompt": [f"say {i}" for i in range(count)],
            "chosen": [f" well {i * i}" + " and more" * (i % 3) for i in range(count)],
            "rejected": [f" no {i}" + " no" * (i % 4) for i in range(count)],
            **columns,
        }
    )


def trainer(
    folder: Any,
    *,
    methods: Any = (),
    trl: bool = False,
    data: Dataset | None = None,
    model: Any = None,
    reference: Any = None,
    dtype: torch.dtype = torch.float32,
    peft_config: Any = None,
    callbacks: Any = None,
    eval_data: Any = None,
    probe_dataset: Dataset | None = None,
    processing_class: Any = None,
    optimizers: Any = (None, None),
    **settings: Any,
) -> Any:
    """Build a trainer; full fine-tuning gets the seed-0 model as reference."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": 4,
    }
    settings = defaults | settings
    adapter = peft_config is not None or isinstance(model, PeftModel)
    if reference is None and not adapter and not settings.get("precompute_ref_log_probs"):
        reference = support.model(dtype=dtype)
    options: dict[str, Any] = {} if trl else {"methods": methods, "probe_dataset": probe_dataset}
    return (TRLDPOTrainer if trl else DPOTrainer)(
        model=support.model(dtype=dtype) if model is None else model,
        ref_model=reference,
        args=DPOConfig(**settings),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        processing_class=processing_class or support.tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
        optimizers=optimizers,
        **options,
    )


def history(run: Any) -> list[dict[str, float]]:
    """Train and return what was logged, without times."""
    run.train()
    timed = ("runtime", "per_second", "flos", "epoch")
    return [{k: v for k, v in log.items() if not any(t in k for t in timed)} for log in run.state.log_history]


def assert_trl_equal(ours: Any, theirs: Any) -> None:
    """Train both: every number that TRL logs is the same, and so is every weight, bit for bit."""
    for left, right in zip(history(ours), history(theirs), strict=True):
        assert right == {name: left[name] for name in right}
    a, b = (run.accelerator.unwrap_model(run.model).state_dict() for run in (ours, theirs))
    support.assert_same(a, b)


def batch(
    logps: Any, ref_logps: Any, *, mask: Any = None, kl: Any = None, beta: float = 0.1, **fields: Any
) -> Batch:
    """A micro-batch of float64 numbers: lists of rows, chosen ones first."""
    logps, ref_logps = _f64(logps), _f64(ref_logps)
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    gauges = Gauges()
    gauges.enter("test")
    return Batch(
        logps=logps,
        mask=mask,
        ref_logps=ref_logps,
        ref_sums=torch.where(mask, ref_logps, 0.0).sum(dim=1),
        sums=torch.where(mask, logps, 0.0).sum(dim=1),
        kl=None if kl is None else _f64(kl),
        beta=beta,
        gauges=gauges,
        **fields,
    )


def _f64(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)
