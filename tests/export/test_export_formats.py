"""Every export is read back with plain transformers and PEFT and computes what was trained."""

import copy
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from export_models import tiny_llama, trained_adapter
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.config.schema import AdapterConfig
from posttrain.export import export as export_module
from posttrain.export.export import MARKER, ExportError, export_model, is_verified
from posttrain.export.verify import TOLERANCES, logits, weights_fingerprint
from posttrain.models.embedded import build_tokenizer
from posttrain.models.load import build_peft_config, load_for_evaluation

IDS = [torch.tensor([[20, 21, 22, 23, 24, 5, 6, 7]])]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3.5},
    "dora": {"dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norm": {"modules_to_save": ["norm"], "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_and_merged_reload_as_trained(variant, tied, dtype, tokenizer, tmp_path):
    model = trained_adapter(tiny_llama(tied=tied, dtype=dtype), **VARIANTS[variant])
    model.train()
    before = weights_fingerprint(model)
    trained = logits(model, IDS)[0]
    with model.disable_adapter():
        untrained = logits(model, IDS)[0]

    adapter = export_model(model, tokenizer, tmp_path / "adapter", format="adapter")
    merged = export_model(model, tokenizer, tmp_path / "merged", format="merged")

    assert weights_fingerprint(model) == before
    assert model.training
    assert all(module.training for module in model.modules())
    # read back here, without any of our code
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter/base")
    torch.testing.assert_close(logits(base, IDS)[0], untrained, rtol=0, atol=0)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again, IDS)[0], trained, rtol=0, atol=0)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert whole.dtype == dtype
    error = (logits(whole, IDS)[0] - trained).abs().max().item()
    assert error <= (1e-5 if dtype == torch.float32 else 0.05)
    assert error < 0.25 * (untrained - trained).abs().max().item()
    assert adapter.comparison.max_difference == 0
    assert adapter.base_bundled
    assert not merged.base_bundled
    assert (adapter.format, merged.format) == ("adapter", "merged")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_full_model_reloads_exactly_with_everything_beside_it(tied, dtype, tokenizer, tmp_path):
    model = tiny_llama(tied=tied, dtype=dtype)
    model.config.use_cache = False  # what gradient checkpointing leaves behind
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

    result = export_model(model, chatty, tmp_path / "out")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) is tied
    assert again.generation_config.temperature == 0.7
    assert again.config.use_cache is True
    assert model.config.use_cache is False
    text = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert text.chat_template == chatty.chat_template
    assert text.decode(text("a  b\n'c'").input_ids) == "a  b\n'c'"
    assert result.format == "full"
    assert result.comparison.max_difference == 0
    assert is_verified(tmp_path / "out") is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_base_with_an_address_is_not_copied_and_auto_classes_find_it(tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    result = export_model(model, tokenizer, tmp_path / "out")
    assert result.base == str(tmp_path / "base")
    assert not (tmp_path / "out/base").exists()
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)


def test_base_made_by_the_same_run_is_bundled(tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "run/warm_start/model")
    model = trained_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "run/warm_start/model"))
    assert not export_model(model, tokenizer, tmp_path / "run/no-run-yet").base_bundled
    (tmp_path / "run/config.yaml").write_text("task: rlvr\n")
    assert export_model(model, tokenizer, tmp_path / "run/export").base_bundled
    assert not export_model(model, tokenizer, tmp_path / "elsewhere").base_bundled


def test_bundled_export_can_be_moved(tokenizer, tmp_path):
    model = trained_adapter(tiny_llama())
    export_model(model, tokenizer, tmp_path / "out")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved, text = load_for_evaluation(tmp_path / "moved")
    torch.testing.assert_close(logits(moved, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)
    assert len(text) == 100


def test_wrong_base_is_refused_and_leaves_nothing(tokenizer, tmp_path):
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    model = trained_adapter(tiny_llama())
    with pytest.raises(ExportError, match=r"not the trained model.*pass bundle_base=True"):
        export_model(model, tokenizer, tmp_path / "out", base_path=str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    result = export_model(
        model, tokenizer, tmp_path / "out", base_path=str(tmp_path / "other"), bundle_base=True
    )
    assert result.base_bundled


def test_merge_that_changes_nothing_is_refused(tokenizer, tmp_path):
    untrained = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(ExportError, match="every B matrix of the adapter is zero"):
        export_model(untrained, tokenizer, tmp_path / "out", format="merged")
    # far below half a unit in the last place of every bf16 weight
    faint = trained_adapter(tiny_llama(dtype=torch.bfloat16), scale=1e-12)
    with pytest.raises(ExportError, match=r"below the resolution of torch\.bfloat16"):
        export_model(faint, tokenizer, tmp_path / "out", format="merged")
    assert list(tmp_path.iterdir()) == []


def test_merge_whose_update_drowns_in_rounding_is_refused(tokenizer, tmp_path):
    # a few weights do change, but the model is closer to the base than to what was trained
    faint = trained_adapter(tiny_llama(dtype=torch.bfloat16), scale=1e-4)
    with pytest.raises(ExportError, match="rounding: export the adapter"):
        export_model(faint, tokenizer, tmp_path / "out", format="merged")
    assert export_model(faint, tokenizer, tmp_path / "out", format="adapter").comparison.max_difference == 0


def test_merge_that_goes_wrong_is_caught(tokenizer, tmp_path, monkeypatch):
    model = trained_adapter(tiny_llama())

    def half_merged(peft_model):
        twin = export_module._cpu_copy(peft_model, torch.float32)
        for layer in twin.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling = {name: 0.5 * value for name, value in layer.scaling.items()}
        return twin.merge_and_unload()

    monkeypatch.setattr(export_module, "_merged_copy", half_merged)
    with pytest.raises(ExportError, match="its logits differ by up to"):
        export_model(model, tokenizer, tmp_path / "out", format="merged")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(tokenizer, tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        export_model(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter", "format", "message"),
    [
        (True, "full", "use 'adapter', or 'merged'"),
        (False, "adapter", "use 'full'"),
        (False, "merged", "use 'full'"),
    ],
)
def test_format_has_to_fit_the_model(adapter, format, message, tokenizer, tmp_path):
    model = trained_adapter(tiny_llama()) if adapter else tiny_llama()
    with pytest.raises(ExportError, match=message):
        export_model(model, tokenizer, tmp_path / "out", format=format)


def test_other_peoples_files_are_never_lost(tokenizer, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("five years")
    with pytest.raises(ExportError, match="not an export of ours"):
        export_model(tiny_llama(), tokenizer, target)
    assert (target / "thesis.txt").read_text() == "five years"
    export_model(tiny_llama(), tokenizer, target, overwrite=True)
    assert (tmp_path / "out.old/thesis.txt").read_text() == "five years"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is a file"):
        export_model(tiny_llama(), tokenizer, tmp_path / "file", overwrite=True)


def test_earlier_export_survives_a_failed_one_and_is_replaced_by_a_good_one(tokenizer, tmp_path):
    first, second = tiny_llama(seed=1), tiny_llama(seed=2)
    export_model(first, tokenizer, tmp_path / "out")
    broken = tiny_llama(seed=3)
    broken.lm_head.weight.data[0] = float("inf")
    with pytest.raises(ExportError):
        export_model(broken, tokenizer, tmp_path / "out")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(kept, IDS)[0], logits(first, IDS)[0], rtol=0, atol=0)
    export_model(second, tokenizer, tmp_path / "out")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(new, IDS)[0], logits(second, IDS)[0], rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_continuing_from_the_export_that_is_replaced_keeps_the_base(tokenizer, tmp_path):
    export_model(trained_adapter(tiny_llama()), tokenizer, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"), is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2
    export_model(model, tokenizer, tmp_path / "out")
    again, _ = load_for_evaluation(tmp_path / "out")
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)


def test_a_named_adapter_lands_where_peft_looks_for_it(tokenizer, tmp_path):
    base = tiny_llama()
    model = get_peft_model(base, build_peft_config(AdapterConfig(r=2), base), adapter_name="policy")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    export_model(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert not (tmp_path / "out/policy").exists()


def test_marker_notices_any_change_but_the_cards(tokenizer, tmp_path):
    export_model(tiny_llama(), tokenizer, tmp_path / "out")
    (tmp_path / "out/README.md").write_text("my own words")
    assert is_verified(tmp_path / "out") is None
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert is_verified(tmp_path / "out").endswith("changed after the export: model.safetensors")
    (tmp_path / "out" / MARKER).unlink()
    assert MARKER in is_verified(tmp_path / "out")


def test_marker_says_what_was_checked(tokenizer, tmp_path):
    model = trained_adapter(tiny_llama())
    export_model(model, tokenizer, tmp_path / "out", format="merged", probe_texts=["ab", "cde"])
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    # 2 + 3 characters, and ids spread over the vocabulary, as many as positions
    assert marker["comparison"]["positions"] == 2 + 3 + 64
    assert marker["comparison"]["tolerance"] >= TOLERANCES[torch.float32]
    assert "model.safetensors" in marker["files"]
    assert str(Path.home()) not in json.dumps(marker)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_moved_weights_out_of_its_base_brings_what_is_left(start, tokenizer, tmp_path):
    settings = LoraConfig(r=4, init_lora_weights=start, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    export_model(model, tokenizer, tmp_path / "out")
    # to transformers, which does not know of such starts, it is a plain adapter
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    base.load_adapter(str(tmp_path / "out"))
    torch.testing.assert_close(logits(base, IDS)[0], logits(model, IDS)[0], rtol=0, atol=1e-5)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again, IDS)[0], logits(model, IDS)[0], rtol=0, atol=0)


@pytest.mark.parametrize("format", ["adapter", "merged", "delta"])
def test_a_disk_that_is_full_in_the_middle_leaves_the_earlier_export(format, tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj"]
    )
    export_model(model, tokenizer, tmp_path / "out", format=format)
    before = (tmp_path / "out" / MARKER).read_bytes()
    # a limit on file sizes, as the kernel enforces it, stands in for the end of the disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            export_model(model, tokenizer, tmp_path / "out", format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert is_verified(tmp_path / "out") is None
    assert (tmp_path / "out" / MARKER).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
