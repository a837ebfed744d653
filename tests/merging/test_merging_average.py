"""Averages of weights: exact, streamed, of what belongs together only."""

import json
import math

import pytest
import support
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.merging.average import MergeError, average, normalised
from posttrain.merging.formulas import (
    best_of_n,
    best_of_n_kl,
    connectivity_gap,
    pair_accuracy,
    pick_win_rate,
)
from posttrain.models.load import ModelLoadError


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    support.tokenizer().save_pretrained(folder)
    return folder


def scorer(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = support.model().config
        known = {key: value for key, value in config.to_dict().items() if "label" not in key}
        return LlamaForSequenceClassification(type(config)(**known, num_labels=1))


def weights(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


# ---- formulas ---------------------------------------------------------------------------------------------


def test_accuracy_connectivity_and_best_of_n():
    assert pair_accuracy([1.0, 2.0, 0.0, 3.0], [0.0, 2.0, 1.0, 1.0]) == (1 + 0.5 + 0 + 1) / 4
    with pytest.raises(ValueError, match="not finite"):
        pair_accuracy([math.nan], [0.0])
    assert connectivity_gap(0.7, 0.6, 0.8, 0.25) == pytest.approx(-0.05)
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(8) == pytest.approx(1.204442, abs=1e-6)
    assert best_of_n_kl(1000) == pytest.approx(5.908755, abs=1e-6)


def test_best_of_n_is_the_mean_over_all_subsets():
    from itertools import combinations

    proxy, gold = [0.3, -1.0, 2.0, 0.3, 0.9], [1.0, 5.0, 2.0, 3.0, 4.0]
    for n in range(1, 6):
        picked = []
        for subset in combinations(range(5), n):
            best = max(proxy[i] for i in subset)
            ties = [gold[i] for i in range(5) if proxy[i] == best]
            picked.append(sum(ties) / len(ties))  # samples that the proxy cannot tell apart share a place
        assert best_of_n(proxy, gold, n) == pytest.approx(sum(picked) / len(picked)), n
    assert best_of_n(proxy, gold, 1) == 3.0
    assert best_of_n(proxy, gold, 5) == 2.0
    assert pick_win_rate(proxy, gold, 1) == 0.5  # a random pick against a random sample
    assert pick_win_rate(proxy, gold, 5) == (1 + 0.5) / 5  # gold 2 beats 1 and ties with itself
    with pytest.raises(ValueError, match="at least as many"):
        best_of_n(proxy, gold, 6)


def test_the_linear_model_of_the_paper():
    """r = w f x: averaged predictions 3.5, predictions of averages 2.75."""
    x, w, f = (
        torch.tensor([2.0, 3.0]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    )
    assert [float(w[i] @ (f[i] * x)) for i in (0, 1)] == [5.0, 2.0]
    assert float(w.mean(0) @ (f.mean(0) * x)) == 2.75
    # a feature that a run learns with probability p: p in the mean of predictions, p^2 in that of weights
    assert pytest.approx(0.111, abs=1e-3) == 0.1 / 0.9
    assert pytest.approx(0.0123, abs=1e-4) == 0.1**2 / 0.9**2


# ---- full models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_average_to_themselves_bit_for_bit(tmp_path, dtype):
    one = save(support.model(tied=True, dtype=dtype), tmp_path / "a")
    average([one] * 3, tmp_path / "mean", weights=[0.2, 0.5, 0.3])
    support.assert_same(weights(one), weights(tmp_path / "mean"))


def test_the_average_is_that_of_the_weights_in_any_order(tmp_path):
    members = [save(scorer(seed), tmp_path / str(seed)) for seed in range(3)]
    shares = [0.5, 0.3, 0.2]
    done = average(members, tmp_path / "mean", weights=shares)
    average(members[::-1], tmp_path / "back", weights=shares[::-1])
    found = weights(tmp_path / "mean")
    support.assert_same(found, weights(tmp_path / "back"))
    for name, tensor in found.items():
        parts = [
            weights(member)[name].double() * share for member, share in zip(members, shares, strict=True)
        ]
        assert torch.allclose(tensor.double(), torch.stack(parts).sum(0), rtol=6e-8, atol=0), name
    assert done.kind == "full"
    assert done.parameters == sum(tensor.numel() for tensor in found.values())
    assert json.loads((tmp_path / "mean" / "posttrain_merge.json").read_text())["weights"] == shares
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    assert torch.equal(model.score.weight, found["score.weight"])
    assert (tmp_path / "mean" / "tokenizer.json").is_file()


def test_heads_on_fixed_features_average_like_predictions(tmp_path):
    first, second = scorer(0), scorer(0)
    torch.nn.init.normal_(second.score.weight)
    average([save(first, tmp_path / "a"), save(second, tmp_path / "b")], tmp_path / "mean")
    mean = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        ensemble = (first.eval()(ids).logits + second.eval()(ids).logits) / 2
        assert torch.allclose(mean.eval()(ids).logits, ensemble, atol=1e-6)


def test_sharded_checkpoints(tmp_path):
    members = [save(support.model(seed), tmp_path / str(seed), max_shard_size="20KB") for seed in (0, 1)]
    whole = [save(support.model(seed), tmp_path / f"whole{seed}") for seed in (0, 1)]
    assert len(list(members[0].glob("*.safetensors"))) > 1
    average([members[0], whole[1]], tmp_path / "mean")  # other shards on the other side
    average(whole, tmp_path / "plain")
    support.assert_same(weights(tmp_path / "mean"), weights(tmp_path / "plain"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "mean")


def test_a_tied_head_that_one_side_stores_twice(tmp_path):
    one, two = (save(support.model(seed, tied=True), tmp_path / str(seed)) for seed in (0, 1))
    stored = load_file(two / "model.safetensors")
    save_file(
        stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        two / "model.safetensors",
        {"format": "pt"},
    )
    for number, members in enumerate(([one, two], [two, one])):
        average(members, tmp_path / f"mean{number}")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"mean{number}")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_integers_are_copied_where_they_are_equal(tmp_path):
    one, two = (save(support.model(seed), tmp_path / str(seed)) for seed in (0, 1))
    for folder, offset in ((one, 0), (two, 0)):
        positions = {"positions": torch.arange(4) + offset}
        save_file(
            load_file(folder / "model.safetensors") | positions,
            folder / "model.safetensors",
            {"format": "pt"},
        )
    average([one, two], tmp_path / "mean")
    assert weights(tmp_path / "mean")["positions"].tolist() == [0, 1, 2, 3]
    save_file(
        load_file(two / "model.safetensors") | {"positions": torch.arange(4) + 1},
        two / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MergeError, match="positions holds I64 numbers"):
        average([one, two], tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / ".other.partial").exists()


def test_what_does_not_belong_together_is_named(tmp_path):
    one = save(support.model(), tmp_path / "one")

    def refused(other, message, **options):
        with pytest.raises(MergeError, match=message):
            average([one, other], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(save(support.model(intermediate_size=32), tmp_path / "shape"), "differ in intermediate_size")
    refused(save(support.model(dtype=torch.bfloat16), tmp_path / "type"), r"is F32 .* and BF16")
    refused(save(support.model(tied=True), tmp_path / "tied"), "differ in tie_word_embeddings")
    refused(save(scorer(0), tmp_path / "head"), "config.json of .* differ in architectures")
    words = save(support.model(), tmp_path / "words")
    tokenizer = support.tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(words)
    refused(words, "the tokenizers of .* differ in added_tokens")
    broken = support.model()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    refused(save(broken, tmp_path / "nan"), "model.norm.weight of .* not finite")
    extra = save(support.model(), tmp_path / "extra")
    save_file(
        load_file(extra / "model.safetensors") | {"v": torch.ones(1)},
        extra / "model.safetensors",
        {"format": "pt"},
    )
    refused(extra, "v is only in")
    with pytest.raises(ModelLoadError, match=r"no such folder: .*/nowhere"):
        average([one, tmp_path / "nowhere"], tmp_path / "out")
    refused(one, "weights >= 0", weights=[1.0, -1.0])
    refused(one, "need 2 weights", weights=[1.0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(MergeError, match="in use"):
        average([one, one], tmp_path / "full")


def test_dropout_may_differ_and_weights_are_divided_by_their_sum(tmp_path):
    one = save(support.model(attention_dropout=0.1), tmp_path / "a")
    average([one, save(support.model(), tmp_path / "b")], tmp_path / "mean")
    assert normalised([1, 3], 2) == (0.25, 0.75)


# ---- adapters ---------------------------------------------------------------------------------------------


def adapter(folder, base, seed, **fields):
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base), LoraConfig(**settings | fields)
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    return folder


def merged(base, folder):
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder)
    return {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize(
    "fields",
    [
        [{}, {}, {}],
        [{"r": 2}, {"r": 4, "use_rslora": True}, {"r": 3, "lora_alpha": 1}],
        [
            {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 1}},
            {"rank_pattern": {"0.self_attn.q_proj": 1}},
        ],
        [{"target_modules": ["embed_tokens", "up_proj"]}] * 2,
    ],
    ids=["alike", "ranks and scales", "patterns", "embeddings"],
)
def test_adapters_average_as_the_models_they_make(tmp_path, fields):
    base = save(scorer(0), tmp_path / "base")
    members = [adapter(tmp_path / str(i), base, i, **extra) for i, extra in enumerate(fields)]
    shares = normalised([1, 2, 3][: len(members)], len(members))
    done = average(members, tmp_path / "mean", weights=shares)
    assert done.kind == "adapter"
    parts = [merged(base, member) for member in members]
    for name, tensor in merged(base, tmp_path / "mean").items():
        expected = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_the_trap_of_averaged_factors(tmp_path):
    """B_1 A_1 and B_2 A_2 on different axes: exact mean 0.5 on the diagonal; means of factors give 0.25."""
    base = save(scorer(0), tmp_path / "base")
    members = [adapter(tmp_path / str(i), base, i, r=1, lora_alpha=1) for i in (0, 1)]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    for axis, member in enumerate(members):
        stored = load_file(member / "adapter_model.safetensors")
        for side in "AB":
            stored[key.format(side)].zero_().view(-1)[axis] = 1.0
        save_file(stored, member / "adapter_model.safetensors", {"format": "pt"})
    average(members, tmp_path / "mean")
    found = load_file(tmp_path / "mean" / "adapter_model.safetensors")
    update = found[key.format("B")] @ found[key.format("A")]  # the scale is 1
    assert torch.equal(update[:2, :2], torch.tensor([[0.5, 0.0], [0.0, 0.5]]))


def test_adapters_that_do_not_add_up_are_refused(tmp_path):
    base, other = save(scorer(0), tmp_path / "base"), save(scorer(1), tmp_path / "other")
    one = adapter(tmp_path / "one", base, 0)

    def refused(member, message):
        with pytest.raises(MergeError, match=message):
            average([one, member], tmp_path / "out")

    refused(adapter(tmp_path / "a", other, 0), "do not have one base")
    refused(adapter(tmp_path / "b", base, 0, use_dora=True), "uses use_dora")
    refused(adapter(tmp_path / "c", base, 0, target_modules=["q_proj"]), "differ in target_modules")
    refused(adapter(tmp_path / "d", base, 0, init_lora_weights="pissa"), "init_lora_weights='pissa'")
    refused(base, "is an adapter and .* is not")


def test_the_verb(tmp_path):
    members = [str(save(support.model(seed), tmp_path / str(seed))) for seed in (0, 1)]
    options = ["--weight", "3", "--weight", "1", "--to", str(tmp_path / "mean"), "--json"]
    result = CliRunner().invoke(app, ["merge", *members, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["weights"] == [0.75, 0.25]
    again = CliRunner().invoke(app, ["merge", *members, "--to", str(tmp_path / "mean")])
    assert again.exit_code == 2
    assert "in use" in again.stderr
