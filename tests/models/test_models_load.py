"""Loading: what fits is loaded as it is, what does not is refused with the fix in the message."""

import json
import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.config.schema import AdapterConfig, ModelConfig
from posttrain.models.embedded import build_model, build_tokenizer
from posttrain.models.load import (
    ModelLoadError,
    build_peft_config,
    is_untrained,
    load_for_evaluation,
    load_model,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
IDS = torch.tensor([[20, 21, 22, 23]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint folder that tests copy from."""
    folder = tmp_path_factory.mktemp("source")
    build_model(1).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(source, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter over ``checkpoint``, saved by PEFT alone, with the logits it had."""
    base, _ = load_model(ModelConfig(path=str(checkpoint)))
    model = get_peft_model(base, build_peft_config(AdapterConfig(r=2), base))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(IDS).logits


def load(path, **fields):
    return load_model(ModelConfig(path=str(path), **fields))


def test_embedded_model():
    model, tokenizer = load("embedded:char-llama")
    assert is_untrained(ModelConfig())
    assert torch.equal(model(IDS).logits, build_model(0)(IDS).logits)
    assert tokenizer.padding_side == "left"
    seeded, _ = load_model(ModelConfig(), seed=4)
    assert torch.equal(seeded(IDS).logits, build_model(4)(IDS).logits)


def test_checkpoint_folder(checkpoint):
    model, tokenizer = load(checkpoint)
    assert not is_untrained(ModelConfig(path=str(checkpoint)))
    assert torch.equal(model(IDS).logits, build_model(1)(IDS).logits)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<pad>", "left")
    assert not model.training


@pytest.mark.parametrize("path", ["embedded:char-llama", "checkpoint"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(path, dtype, checkpoint):
    model, _ = load(checkpoint if path == "checkpoint" else path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.dtype == model.config.dtype == getattr(torch, dtype)
    # rounding the rotary frequencies would shift every position
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_auto_dtype_is_that_of_the_checkpoint(tmp_path):
    model, tokenizer = load("embedded:char-llama", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == torch.bfloat16


def test_attention_kernel(checkpoint):
    assert load(checkpoint, attn_implementation="eager")[0].config._attn_implementation == "eager"
    assert load("embedded:char-llama", attn_implementation="eager")[0].config._attn_implementation == "eager"
    for path in (checkpoint, "embedded:char-llama"):
        with pytest.raises(ModelLoadError, match=r"attn_implementation.*flash_attention_2"):
            load(path, attn_implementation="fast")


# ---- adapters ---------------------------------------------------------------------------------------------


def test_adapter_for_evaluation(adapter):
    folder, expected = adapter
    model, tokenizer = load_for_evaluation(folder)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in model.parameters())
    assert len(tokenizer) == 100


def test_adapter_to_train_further(adapter):
    folder, expected = adapter
    model, _ = load(folder)
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    with pytest.raises(ModelLoadError, match="merge the first"):
        load(folder, adapter=AdapterConfig())


def test_adapter_whose_base_moved(adapter, checkpoint, tmp_path):
    folder, expected = adapter
    checkpoint.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelLoadError, match=r"belongs to the base .*checkpoint', which is not there"):
        load_for_evaluation(folder)
    model, _ = load_for_evaluation(folder, base=tmp_path / "elsewhere")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recorded", "message"), [(None, "built in memory"), ("embedded:char-llama", "the run's export")]
)
def test_adapter_without_an_address_of_its_base(recorded, message, adapter):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": recorded}))
    with pytest.raises(ModelLoadError, match=message):
        load_for_evaluation(folder)


def test_adapter_of_another_model(adapter, tmp_path):
    folder, _ = adapter
    build_model(hidden_size=64).save_pretrained(tmp_path / "narrow")
    build_tokenizer().save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelLoadError, match="does not fit the base"):
        load_for_evaluation(folder, base=tmp_path / "narrow")
    for layers in (2, 4):  # tensors left over, tensors missing
        build_model(layers=layers).save_pretrained(tmp_path / "other")
        build_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(ModelLoadError, match="does not fit the base"):
            load_for_evaluation(folder, base=tmp_path / "other")


def test_damaged_adapter(adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelLoadError, match="does not fit the base"):
        load_for_evaluation(folder)


def test_pickled_adapter_is_refused(adapter):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"adapter_model\.bin.*can run code.*adapter_model\.safetensors"):
        load_for_evaluation(folder)


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./nope", "/nope/nope", "a/b/c", "nope/"])
def test_missing_folder(path):
    with pytest.raises(ModelLoadError, match=r"no such folder: .*nope|no such folder: 'a/b/c'") as failure:
        load(path)
    assert str(Path(path).absolute()) in str(failure.value)


def test_hub_id_that_is_not_in_the_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError) as failure:
        load("someone/something")
    message = str(failure.value)
    assert "no folder of that name in" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert "hf download someone/something" in message


def test_folder_of_checkpoints(checkpoint, tmp_path):
    with pytest.raises(ModelLoadError, match=r"not a checkpoint.*Its folders \['checkpoint'\] do"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadError, match=r"neither config\.json nor adapter_config\.json"):
        load(tmp_path / "empty")


def test_pickled_weights_are_refused_without_being_opened(checkpoint):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (checkpoint / "trapped",))

    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"holds no weights: model\.safetensors is missing"):
        load(checkpoint)
    torch.save(Trap(), checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*can run code"):
        load(checkpoint)
    assert not (checkpoint / "trapped").exists()


def test_code_shipped_with_a_checkpoint_does_not_run(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "strange"
    config["auto_map"] = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeModel",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "strange.py").write_text(f"open({str(checkpoint / 'trapped')!r}, 'w')\n")
    with pytest.raises(ModelLoadError, match="trust_remote_code: true if you trust it"):
        load(checkpoint)
    assert not (checkpoint / "trapped").exists()


def test_truncated_weights(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="damaged or cut short"):
        load(checkpoint)


def test_weights_that_are_missing_are_not_made_up(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(checkpoint)


def test_missing_tokenizer(checkpoint, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(ModelLoadError, match=r"no tokenizer: .*tokenizer\.json.*model\.tokenizer"):
        load(checkpoint)
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert len(load(checkpoint, tokenizer=str(tmp_path / "tokenizer"))[1]) == 100


@pytest.mark.parametrize("field", ["tokenizer", "revision"])
def test_embedded_model_brings_its_own(field):
    with pytest.raises(ModelLoadError, match=f"model.{field} does not go with"):
        load("embedded:char-llama", **{field: "x/y"})
    with pytest.raises(ModelLoadError, match="unknown embedded model 'embedded:gpt'"):
        load("embedded:gpt")


# ---- vocabulary and padding -------------------------------------------------------------------------------


def narrow_checkpoint(folder, rows, tokenizer):
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizer_of_another_model(tmp_path):
    folder = narrow_checkpoint(tmp_path, 90, build_tokenizer())
    with pytest.raises(
        ModelLoadError, match=r"10 tokens with ids from 90 up to 99, but the model has 90 .*'u'"
    ):
        load(folder)


def test_special_tokens_without_a_row_are_only_mentioned(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    folder = narrow_checkpoint(tmp_path, 100, tokenizer)
    with pytest.warns(UserWarning, match="1 tokens with ids from 100 up to 100"):
        load(folder)


def test_pad_token_in_use_needs_a_row(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    folder = narrow_checkpoint(tmp_path, 100, tokenizer)
    with pytest.raises(ModelLoadError, match="'<new pad>'"):
        load(folder)


def without(tokenizer, folder, *fields):
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in fields}
    path.write_text(json.dumps(config))


def test_missing_pad_token_is_found_in_the_vocabulary(checkpoint):
    without(build_tokenizer(), checkpoint, "pad_token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = load(checkpoint)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<pad>", 0, 100)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


def test_eos_pads_only_when_nothing_else_can(checkpoint):
    text = (checkpoint / "tokenizer.json").read_text()
    for old, new in (("<pad>", "<a>"), ("<unk>", "<b>")):
        text = text.replace(old, new)
    (checkpoint / "tokenizer.json").write_text(text)
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("pad_token", "unk_token")}))
    with pytest.warns(UserWarning, match="padding with its end-of-text token '<eos>'"):
        model, tokenizer = load(checkpoint)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2


def test_end_of_text_token(checkpoint, tmp_path):
    without(build_tokenizer(), checkpoint, "eos_token")
    _, tokenizer = load(checkpoint)  # from generation_config.json
    assert tokenizer.eos_token == "<eos>"
    folder = narrow_checkpoint(tmp_path / "no-eos", 100, build_tokenizer())
    without(build_tokenizer(), folder, "eos_token")
    with pytest.raises(ModelLoadError, match="no end-of-text token"):
        load(folder)


@pytest.mark.skipif(
    not (SHARED / "checkpoints/stories260K").is_dir(), reason="../shared/checkpoints is not there"
)
def test_real_checkpoint():
    model, tokenizer = load(SHARED / "checkpoints/stories260K")
    assert model.num_parameters() == 260_032
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl")


# ---- adapter configuration --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untied():
    return build_model()


def test_peft_config_says_what_was_asked(untied):
    config = build_peft_config(
        AdapterConfig(r=8, dropout=0.1, rslora=True, dora=True, modules_to_save=["lm_head"]), untied
    )
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert (config.use_rslora, config.use_dora, config.modules_to_save) == (True, True, ["lm_head"])
    assert config.task_type == "CAUSAL_LM"
    assert build_peft_config(AdapterConfig(r=8, alpha=3), untied).lora_alpha == 3


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.0\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
    ],
)
def test_targets_reach_the_modules_they_name(targets, expected):
    base = build_model()
    model = get_peft_model(base, build_peft_config(AdapterConfig(target_modules=targets), base))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert {name.rpartition(".")[2] for name in adapted} == expected
    assert len(adapted) == len(expected) * (1 if isinstance(targets, str) and "0" in targets else 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, r"no module is called \['query'\].*Linear layers.*q_proj"),
        ({"target_modules": "q_proj"}, r"matches no module.*write a list: \[q_proj\]"),
        ({"target_modules": ".*attention.*"}, "matches no module.*Linear layers"),
        ({"target_modules": "(("}, "is not a regular expression"),
        ({"target_modules": []}, "the list is empty"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: no module is called \['head'\].*lm_head"),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
            "either adapted or trained in full",
        ),
    ],
)
def test_names_that_do_not_exist_are_refused(fields, message, untied):
    with pytest.raises(ValueError, match=message):
        build_peft_config(AdapterConfig(**fields), untied)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
def test_tied_embeddings_stay_tied(fields):
    tied = build_model(tie_word_embeddings=True)
    assert build_peft_config(AdapterConfig(**fields), tied).ensure_weight_tying
    assert not build_peft_config(AdapterConfig(), tied).ensure_weight_tying
    assert not build_peft_config(AdapterConfig(**fields), build_model()).ensure_weight_tying
