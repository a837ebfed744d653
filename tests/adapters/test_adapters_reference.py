"""With every adapter a run starts at its reference, DPO at ln 2, GRPO at KL 0; the reference stays put."""

import copy
import gc
import logging
import math

import peft
import pytest
import support
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig

from posttrain import DPOTrainer, GRPOTrainer
from posttrain.adapters.reference import AdapterError, hides_start, start_gap

SOME = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SOFT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
ROWS = Dataset.from_dict(
    {
        "prompt": [f"say {i}" for i in range(4)],
        "chosen": [f" well {i * i}" for i in range(4)],
        "rejected": [f" no {i}" for i in range(4)],
    }
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """transformers collects garbage in every training; what the imports left takes most of that time."""
    gc.freeze()
    yield
    gc.unfreeze()


def lora(**fields):
    return LoraConfig(**({"r": 4, "lora_alpha": 8} | SOME | fields))


def mixtral():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 45}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
        return MixtralForCausalLM(MixtralConfig(**small, **heads, pad_token_id=0, eos_token_id=1))


def prepared_lora_ga(model):
    config = lora(init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.LoraGAConfig())
    ids = torch.arange(3, 43).view(2, 20)
    peft.tuners.lora.preprocess_loraga(
        model, config, train_step=lambda: model(ids, labels=ids).loss.backward()
    )
    model.zero_grad()
    return config


# the toy model, then its adapter; whether the model with its adapter off is not the initial policy
MOVED = {
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter_4": lora(init_lora_weights="pissa_niter_4"),
    "pissa, dora": lora(init_lora_weights="pissa", use_dora=True),
    "olora": lora(init_lora_weights="olora"),
    "lora_ga": prepared_lora_ga,
    "random": lora(init_lora_weights=False),
    "c3a": peft.C3AConfig(block_size=4, **SOME),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **SOME),
    "unilora": peft.UniLoraConfig(**SOME),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=16, **SOME),
    "prefix": peft.PrefixTuningConfig(**SOFT),
    "prompt": peft.PromptTuningConfig(**SOFT),
    "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=16, **SOFT),
    "cartridge": peft.CartridgeConfig(**SOFT),
}
SAME = {
    "lora": lora(),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "eva": lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias": lora(lora_bias=True),
    "modules_to_save": lora(modules_to_save=["norm"]),
    "tokens": lora(trainable_token_indices=[3, 4]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "adalora": peft.AdaLoraConfig(total_step=10, **SOME),
    "boft": peft.BOFTConfig(boft_block_size=4, **SOME),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, **SOME),
    "hra": peft.HRAConfig(r=4, **SOME),
    "ia3": peft.IA3Config(feedforward_modules=[], **SOME),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "loha": peft.LoHaConfig(r=4, **SOME),
    "lokr": peft.LoKrConfig(r=4, **SOME),
    "miss": peft.MissConfig(r=4, **SOME),
    "osf": peft.OSFConfig(**SOME),
    "randlora": peft.RandLoraConfig(r=4, **SOME),
    "road": peft.RoadConfig(group_size=16, **SOME),
    "shira": peft.ShiraConfig(r=4, **SOME),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[3, 4], task_type="CAUSAL_LM"),
    "vera": peft.VeraConfig(r=4, **SOME),
    "waveft": peft.WaveFTConfig(n_frequency=20, **SOME),
}
ALL = {**MOVED, **SAME}


START_ELSEWHERE = {
    "random",
    "c3a",
    "fourierft",
    "unilora",
    "vblora",
    "prefix",
    "prompt",
    "p-tuning",
    "cartridge",
}


def made(config, model):
    return config(model) if callable(config) else copy.deepcopy(config)  # PEFT writes into it


def build(folder, config, *, ready=False, model=None, rows=ROWS, **settings):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": 2,
    }
    model = support.model() if model is None else model
    config = made(config, model)
    if ready:
        torch.manual_seed(5)
        model = get_peft_model(model, config)
    return DPOTrainer(
        model=model,
        args=DPOConfig(**(defaults | settings)),
        train_dataset=rows,
        processing_class=support.tokenizer(),
        peft_config=None if ready else config,
    )


def losses(run, **options):
    run.train(**options)
    return [row["loss"] for row in run.state.log_history if "loss" in row]


IDS = torch.arange(3, 27).view(2, 12)


@torch.no_grad()
def reference_of(run):
    """Log-probabilities that the reference of a run gives to some tokens."""
    run.model.eval()
    with run._reference() as (reference, _):
        return reference(input_ids=IDS, labels=IDS, fused_lm_head=True, use_cache=False).log_probs[:, -11:]


@torch.no_grad()
def scores_of(model):
    scores = model(input_ids=IDS).logits[:, -12:-1].log_softmax(-1)
    return scores.gather(2, IDS[:, 1:].unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("name", ALL)
def test_step_0_is_ln_2_and_the_reference_stays(tmp_path, name):
    run = build(tmp_path, ALL[name])
    assert ("ref" in run.model.peft_config) == (name in MOVED)
    before = reference_of(run)
    assert torch.allclose(before, scores_of(support.model()), atol=1e-5) == (name not in START_ELSEWHERE)
    first, second = losses(run)
    assert abs(first - math.log(2)) < 1e-6
    assert second < first - 1e-6  # and it does train
    assert torch.equal(reference_of(run), before)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("name", ["lora", "pissa", "olora", "random", "fourierft", "adalora", "prompt"])
def test_step_0_is_ln_2_with_precomputed_references(tmp_path, name, ready):
    run = build(tmp_path, ALL[name], ready=ready, precompute_ref_log_probs=True, max_steps=1)
    assert abs(losses(run)[0] - math.log(2)) < 1e-6


@pytest.mark.parametrize("name", ["pissa", "olora", "lora_ga", "c3a", "vblora", "adalora", "p-tuning"])
def test_a_ready_adapter_is_copied_and_nothing_else_changes(tmp_path, name):
    """TRL subtracts PiSSA's part from the base again, leaves C3A's kernel out, and fails for AdaLoRA."""
    model = support.model()
    config = made(ALL[name], model)
    policy = get_peft_model(model, config)
    untouched = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    trains = {key for key, tensor in policy.named_parameters() if tensor.requires_grad}
    run = DPOTrainer(
        model=policy,
        args=DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, logging_steps=1
        ),
        train_dataset=ROWS,
        processing_class=support.tokenizer(),
    )
    state = policy.state_dict()
    assert [key for key, tensor in untouched.items() if not torch.equal(state[key], tensor)] == []
    assert {key for key, tensor in policy.named_parameters() if tensor.requires_grad} == trains
    assert policy.peft_config["default"] is config
    assert torch.allclose(reference_of(run), scores_of(policy), atol=1e-5)
    assert abs(losses(run)[0] - math.log(2)) < 1e-6


@pytest.mark.parametrize("init", [True, "pissa", False])
@pytest.mark.parametrize("ready", [False, True])
def test_checkpointing_bfloat16_and_experts(tmp_path, init, ready):
    config = lora(init_lora_weights=init)
    assert (
        abs(losses(build(tmp_path, config, ready=ready, gradient_checkpointing=True))[0] - math.log(2)) < 1e-6
    )
    half = build(tmp_path, config, ready=ready, model=support.model(dtype=torch.bfloat16), bf16=True)
    assert abs(losses(half)[0] - math.log(2)) < 1e-6
    if init != "pissa":  # PEFT has no such start for expert parameters
        experts = lora(init_lora_weights=init, target_modules=[], target_parameters=["experts.gate_up_proj"])
        moe = build(tmp_path, experts, ready=ready, model=mixtral(), router_aux_loss_coef=0.0)
        assert abs(losses(moe)[0] - math.log(2)) < 1e-6


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (
            peft.CPTConfig(
                cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], task_type="CAUSAL_LM"
            ),
            "CPT",
        ),
        (
            peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
            "ADAPTION_PROMPT",
        ),
        (peft.MultitaskPromptTuningConfig(num_tasks=1, **SOFT), "MULTITASK_PROMPT_TUNING"),
        (peft.PolyConfig(r=2, **SOME), "POLY"),
    ],
)
def test_adapters_that_cannot_score_tokens_are_refused(tmp_path, config, word):
    with pytest.raises(AdapterError, match=f"type {word} cannot be trained here"):
        build(tmp_path, config)


def test_resume_keeps_the_reference(tmp_path):
    """transformers loads the adapter of the reference and forgets the trained one beside it."""
    rows = Dataset.from_list(list(ROWS) * 4)
    options = {"rows": rows, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = build(tmp_path / "a", MOVED["pissa"], **options)
    losses(straight)
    again = build(tmp_path / "b", MOVED["pissa"], **options)
    losses(again, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    support.assert_same(support.weights(straight.model), support.weights(again.model))


@pytest.mark.parametrize(("init", "copied"), [(True, False), ("pissa", True), (False, True)])
def test_the_kl_term_of_grpo_starts_at_0(tmp_path, init, copied):
    run = GRPOTrainer(
        model=support.model(),
        args=support.grpo_config(tmp_path, beta=0.1, max_steps=1),
        reward_funcs=support.letter_reward,
        train_dataset=support.prompts(),
        processing_class=support.tokenizer(),
        peft_config=lora(init_lora_weights=init),
    )
    run.train()
    assert ("ref" in run.model.peft_config) == copied
    assert support.logged(run, "kl")[0][0] < 1e-9


@pytest.mark.parametrize(("name", "fits"), [("pissa", True), ("pissa_niter_4", False), ("lora_ga", False)])
def test_adapters_that_do_not_fit_the_published_base_are_told(tmp_path, caplog, name, fits):
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        run = build(tmp_path, ALL[name])
    run.save_model(tmp_path / "saved")
    torch.manual_seed(1)  # another process
    again = peft.PeftModel.from_pretrained(support.model(), tmp_path / "saved")
    same = torch.allclose(scores_of(again), scores_of(run.model), atol=1e-5)
    assert same == fits == ("does not fit the base as published" not in caplog.text)
    assert torch.allclose(scores_of(run.model.merge_and_unload()), scores_of(support.model()), atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "gaussian", "random", "fourierft"])
def test_where_nothing_can_be_measured_the_kind_decides(name):
    """Under DeepSpeed ZeRO-3 and on the ranks of FSDP that load nothing, weights are not at hand."""
    with torch.device("meta"):
        policy = get_peft_model(support.model(), made(ALL[name], None))
    assert hides_start(policy) == (name in MOVED)


# ---- the check of step 0 ---------------------------------------------------------------------------------


def test_the_gap_is_per_token_and_of_the_worst_row():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert start_gap(torch.tensor([0.3, -0.8]), mask) == pytest.approx(0.4)


def test_an_adapter_that_was_changed_late_is_an_error(tmp_path):
    run = build(tmp_path, SAME["lora"])
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(AdapterError, match="before the first step policy and reference differ"):
        run.train()


@pytest.mark.parametrize(
    ("given", "dropout", "said"), [(False, 0.0, True), (True, 0.0, False), (False, 0.1, False)]
)
def test_a_full_model_that_was_changed_after_loading_is_named(tmp_path, caplog, given, dropout, said):
    support.model().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", attention_dropout=dropout)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    run = DPOTrainer(
        model=model,
        ref_model=support.model() if given else None,
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1),
        train_dataset=ROWS,
        processing_class=support.tokenizer(),
    )
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        run.train()
    assert ("give ref_model" in caplog.text) == said
