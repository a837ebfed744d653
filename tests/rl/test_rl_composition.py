"""Which methods and settings go together: the verdict of every pair, and what "off" means for all at once."""

import pytest
import support
from rollout_ranks import FixedRollouts, even, written
from trl import GRPOTrainer as TRLGRPOTrainer

from posttrain import GRPOTrainer
from posttrain.rl import (
    ACE,
    AEPO,
    TTRL,
    DynamicSampling,
    GardoDiversity,
    GardoReference,
    LpReg,
    SkipZeroAdvantage,
    Spine,
)
from posttrain.rl.registry import available
from posttrain.rl.trainer import check_methods

FINE, WARN, REFUSE = "fine", "warn", "refuse"

LP = {"epsilon": 1.0, "epsilon_high": 9.0}  # the recipe of Lp-Reg
VOTES = {"num_generations": 8}
NO_BAND = {"band_weight_low": 0.0, "band_weight_high": 0.0}


def vote():
    return TTRL(n_votes=8, n_samples=8)


def verdict(tmp_path, methods, settings, rewards=("graded",)):
    """What the trainer says before it loads a model: (verdict, messages)."""
    try:
        warnings = check_methods(
            methods, support.grpo_config(tmp_path, **settings), adapter=False, reward_names=rewards
        )
    except ValueError as error:
        return REFUSE, str(error)
    return (WARN if warnings else FINE), "; ".join(warning.message for warning in warnings)


@pytest.mark.parametrize(
    ("methods", "settings", "expected", "words"),
    [
        ([ACE()], {"epsilon_high": 0.28}, FINE, ""),
        ([ACE(), LpReg()], LP, FINE, ""),
        ([ACE(), vote()], VOTES, WARN, "outvoted"),
        ([ACE(), Spine(), vote()], VOTES, WARN, "outvoted"),
        ([ACE()], {"sync_ref_model": True, "beta": 0.1}, REFUSE, "sync_ref_model"),
        ([ACE()], {"importance_sampling_level": "sequence"}, FINE, ""),
        ([Spine(), vote()], VOTES, FINE, ""),
        ([Spine()], {"top_entropy_quantile": 0.5}, REFUSE, "top_entropy_quantile"),
        ([Spine()], {"entropy_coef": 0.01}, REFUSE, "entropy_coef"),
        ([Spine()], {"use_adaptive_entropy": True}, REFUSE, "use_adaptive_entropy"),
        ([Spine()], {"importance_sampling_level": "sequence"}, REFUSE, "sequence"),
        ([Spine(), AEPO()], {}, WARN, "band_weight_high"),
        (
            [Spine(band_weight_high=0), AEPO()],
            {},
            FINE,
            "",
        ),
        ([LpReg(), Spine()], LP, FINE, ""),
        ([LpReg()], {**LP, "importance_sampling_level": "sequence"}, REFUSE, "sequence"),
        ([LpReg()], {**LP, "loss_type": "cispo"}, REFUSE, "cispo"),
        ([LpReg()], {**LP, "loss_type": "sapo"}, REFUSE, "sapo"),
        ([LpReg()], {**LP, "loss_type": "vespo"}, REFUSE, "vespo"),
        ([LpReg()], {**LP, "loss_type": "luspo"}, REFUSE, "luspo"),
        ([LpReg()], {}, WARN, "epsilon"),
        (
            [AEPO()],
            {"entropy_coef": 0.01},
            REFUSE,
            "entropy_coef",
        ),
        ([AEPO()], {"use_adaptive_entropy": True}, REFUSE, "use_adaptive_entropy"),
        ([AEPO(mode="alpha")], {"loss_type": "grpo"}, FINE, ""),
        ([AEPO(mode="alpha")], {"loss_type": "dapo"}, WARN, "weighs tokens"),
        ([AEPO(mode="alpha")], {"loss_type": "dr_grpo"}, WARN, "weighs tokens"),
        ([AEPO()], {"loss_type": "dapo"}, FINE, ""),
        (
            [AEPO()],
            {"importance_sampling_level": "sequence"},
            FINE,
            "",
        ),
        ([AEPO(), ACE(), LpReg()], LP, FINE, ""),
        ([AEPO(), vote()], VOTES, WARN, "ttrl/label_accuracy"),
        ([DynamicSampling(), ACE(), LpReg()], LP, FINE, ""),
        ([DynamicSampling(), vote(), Spine()], VOTES, FINE, ""),
        ([DynamicSampling(), SkipZeroAdvantage()], {}, FINE, ""),
        ([SkipZeroAdvantage(), ACE(), LpReg()], LP, FINE, ""),
        ([SkipZeroAdvantage(), Spine(**NO_BAND)], {}, FINE, ""),
        ([SkipZeroAdvantage(), Spine()], {}, REFUSE, "spine acts on them"),
        ([SkipZeroAdvantage(), AEPO()], {}, REFUSE, "aepo acts on them"),
        ([SkipZeroAdvantage(), AEPO(max_aux_rows=0)], {}, FINE, ""),
        ([SkipZeroAdvantage()], {"beta": 0.1}, REFUSE, "beta=0.1"),
        ([SkipZeroAdvantage(), DynamicSampling(), GardoDiversity()], {"scale_rewards": "none"}, FINE, ""),
        ([AEPO(), DynamicSampling(), GardoDiversity()], {"scale_rewards": "none"}, FINE, ""),
        ([AEPO(), GardoReference()], {"beta": 0.1}, FINE, ""),
        ([ACE(), GardoReference()], {"beta": 0.1}, REFUSE, "fixed reference"),
    ],
    ids=lambda value: "+".join(m.name for m in value) if isinstance(value, list) else None,
)
def test_verdict(methods, settings, expected, words, tmp_path):
    found, messages = verdict(tmp_path, methods, {"per_device_train_batch_size": 8, **settings})
    assert found == expected, messages
    assert words in messages


def test_an_order_of_methods_does_not_change_the_verdict(tmp_path):
    for methods in ([ACE(), vote(), Spine()], [Spine(), vote(), ACE()], [vote(), Spine(), ACE()]):
        assert verdict(tmp_path, methods, {**VOTES, "per_device_train_batch_size": 8})[0] == WARN


def neutral_settings():
    """Every method that has a setting at which it does nothing."""
    return {
        "ace": ACE(alpha=0),
        "aepo": AEPO(max_aux_rows=0),
        "dynamic_sampling": DynamicSampling(max_rounds=0),
        "lp_reg": LpReg(beta=0),
        "spine": Spine(fork_ratio=1.0, kl_coef=0, **NO_BAND),
    }


def test_all_switches_off_is_trl_bit_for_bit(tmp_path):
    methods = neutral_settings()
    assert set(methods) <= set(available())
    assert all(method.neutral for method in methods.values())
    runs = []
    for cls, kwargs in [(TRLGRPOTrainer, {}), (GRPOTrainer, {"methods": list(methods.values())})]:
        trainer = cls(
            model=support.model(),
            args=support.grpo_config(tmp_path / cls.__module__, max_steps=20, epsilon=1.0, epsilon_high=9.0),
            reward_funcs=support.letter_reward,
            train_dataset=support.prompts(),
            processing_class=support.tokenizer(),
            **kwargs,
        )
        trainer.train()
        runs.append(trainer)
    upstream, ours = runs
    keys = ("loss", "grad_norm", "reward", "entropy", "clip_ratio/low_mean", "num_tokens")
    assert support.logged(ours, *keys) == support.logged(upstream, *keys)
    assert len(support.logged(ours, *keys)) == 20
    support.assert_same(support.weights(ours.model), support.weights(upstream.model))


def test_everything_that_goes_together_trains_together(tmp_path):
    """Refill, tempered rows, ACE, mask and shield in one run: every gauge is there and the loss is finite."""
    methods = [
        DynamicSampling(max_rounds=1),
        AEPO(max_aux_rows=2),
        ACE(),
        Spine(band_weight_high=0),
        LpReg(rho=0.5),
    ]
    trainer = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(
            tmp_path, max_steps=3, per_device_train_batch_size=16, steps_per_generation=2, **LP
        ),
        reward_funcs=lambda completions, **_: [float("e" in text) for text in completions],
        train_dataset=support.prompts(64),
        processing_class=support.tokenizer(),
        methods=methods,
    )
    trainer.train()
    logged = set().union(*(row.keys() for row in trainer.state.log_history))
    for name in (
        "dynamic_sampling/rounds",
        "aepo/used_rows",
        "ace/weight_mean",
        "spine/fork_share",
        "lp_reg/gated_share",
    ):
        assert name in logged
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 3
    assert min(norms) > 0


def test_refilled_groups_vote_among_themselves_and_train_their_samples(tmp_path):
    """TTRL with half of the votes training: the log has the first generation, what trains disagrees."""
    trainer = FixedRollouts(
        model=support.model(),
        args=support.grpo_config(tmp_path, per_device_train_batch_size=16),
        reward_funcs=even,
        train_dataset=support.prompts(40),
        processing_class=support.tokenizer(),
        methods=[
            TTRL(n_votes=4, n_samples=2, extract="choice", equivalence="exact"),
            DynamicSampling(max_rounds=9),
        ],
    )
    votes = {}

    def read(text, how):  # prompts 0 and 2 are unanimous, others split two to two
        return votes[text]

    for n in range(40):
        for i in range(4):
            text = trainer._tokenizer.decode(written(trainer.train_dataset[n]["prompt"], i))
            votes[text] = "A" if n in (0, 2) or i in (0, 3) else "B"
    trainer.model.train()
    rows = [dict(trainer.train_dataset[n]) for n in (0, 1, 2, 3) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.rl.ttrl.read_answer", read)
        batch = trainer._generate_and_score_completions(rows)
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/dead_groups"] == [0.5]
    assert metrics["dynamic_sampling/left_dead"] == [0.0]
    assert metrics["ttrl/majority_ratio"] == [0.75]  # 1, 1/2, 1, 1/2: the first generation
    assert len(batch["prompt_ids"]) == 8  # two of four rows train
    assert batch["posttrain/reward"].tolist() == [1.0, 0.0] * 4  # the tie goes to the first
    texts = trainer.texts_of(batch)
    kept = {
        trainer._tokenizer.decode(written(trainer.train_dataset[n]["prompt"], i))
        for n in (0, 2)
        for i in (0, 1)
    }
    assert not kept & set(texts)
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
