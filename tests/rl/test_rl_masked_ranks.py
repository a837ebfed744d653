"""A rank that holds only rows that the loss leaves out: it takes part in everything and adds zero."""

import pytest
from test_rl_rollout_ranks import run, same

TOKENS = {
    "ace": {},
    "gardo_diversity": {},
    "spine": {"band_weight_low": 0.05, "band_weight_high": 0.05},
    "lp_reg": {"rho": 0.5, "kappa": 0.5, "scope": "generation_batch"},
}
SETS = {
    "tokens": TOKENS,
    "live tokens": {"lp_reg": {"rho": 0.5, "rho_pos": 0.5, "kappa": 0.5, "proxy": "live", "kl": "forward"}},
    "rows": {"dynamic_sampling": {"max_rounds": 2}, "skip_zero_advantage": {}, "ace": {}},
    "controllers": {
        "constrained": {"at_least": {"even": 0.6}, "task": "kl"},
        "aepo": {"max_aux_rows": 3, "target_entropy": 3.0},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "loss_type", "updates"),
    [("tokens", "grpo", 2), ("live tokens", "dapo", 1), ("rows", "dapo", 1), ("controllers", "dapo", 1)],
)
def test_a_rank_of_masked_rows(chosen, loss_type, updates, tmp_path):
    settings = {"loss_type": loss_type, "num_iterations": updates, "mask_truncated_completions": True}
    settings |= {"epsilon": 1.0, "epsilon_high": 9.0, "max_completion_length": 12}
    files = {"script": "masked_ranks.py"}
    one = run(tmp_path, "one", SETS[chosen], per_device_train_batch_size=16, **files, **settings)
    two = run(tmp_path, "two", SETS[chosen], ranks=2, per_device_train_batch_size=8, **files, **settings)
    assert any(abs(row["grad_norm"]) > 1e-3 for row in one["logs"])
    same(two, one)
