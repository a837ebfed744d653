"""What is said before a model is loaded."""

import pytest
import torch

from posttrain.config.schema import RunConfig
from posttrain.run.starting import slow_here


@pytest.mark.parametrize(
    ("gpu", "dtype", "warned"),
    [(False, "bfloat16", True), (False, "float32", False), (False, "auto", False), (True, "bfloat16", False)],
)
def test_a_configuration_for_gpus_says_at_once_that_there_is_none(monkeypatch, gpu, dtype, warned):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    config = RunConfig.model_validate(
        {
            "task": "sft",
            "run_dir": "run",
            "model": {"path": "Qwen/Qwen2.5-7B", "dtype": dtype},
            "data": {"source": "reasoning_gym:chain_sum"},
        }
    )
    found = slow_here(config)
    assert (found is not None) == warned
    assert found is None or ("Qwen/Qwen2.5-7B" in found and "quickstart.yaml" in found)
