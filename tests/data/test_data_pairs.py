"""Pairs of answers: every form, what is left out and said, label noise, and TRL's tokens."""

import json
from types import SimpleNamespace

import pytest
import support
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from posttrain.config.schema import DataConfig
from posttrain.data import DataError, load_data, render
from posttrain.data.pairs import apply_pair_lengths, encode_pair, encode_scored

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def say(role, text):
    return {"role": role, "content": text}


@pytest.fixture
def load(tmp_path):
    def load(rows, task="preference", **config):
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_data(DataConfig(source=str(file), **config), task, hold_out=False)

    return load


def pair(index, **more):
    return {"prompt": f"question {index}?", "chosen": f" good {index}", "rejected": " bad", **more}


def test_explicit_pairs_keep_their_other_columns(load):
    data = load([pair(1, source="a"), pair(2, source="b")])
    assert data.train.column_names == ["prompt", "chosen", "rejected", "source"]
    assert data.train[1] == pair(2, source="b")
    assert data.describe["notes"] == []


def test_the_prompt_of_messages_is_what_both_begin_with(load):
    asked = [say("user", "hi")]
    row = {"chosen": [*asked, say("assistant", "hello")], "rejected": [*asked, say("assistant", "go")]}
    (found,) = load([row]).train
    assert found == {
        "prompt": asked,
        "chosen": [say("assistant", "hello")],
        "rejected": [say("assistant", "go")],
    }


def test_a_question_as_text_beside_whole_conversations(load):
    asked = [say("system", "be kind"), say("user", "hi")]
    row = {
        "prompt": "hi",
        "chosen": [*asked, say("assistant", "hello")],
        "rejected": [*asked, say("assistant", "go")],
        "messages": [*asked, say("assistant", "hello")],
    }
    (found,) = load([row]).train
    assert found["prompt"] == asked
    assert "messages" not in found  # TRL may take it for the kind of the data


def test_text_and_messages_are_made_alike(load):
    (found,) = load(
        [{"prompt": "hi", "chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]}]
    ).train
    assert found["prompt"] == [say("user", "hi")]


def test_an_implicit_prompt_of_text(load):
    data = load([{"chosen": "one two three", "rejected": "one two four"}])
    assert data.train[0] == {"prompt": "one two", "chosen": " three", "rejected": " four"}
    with pytest.raises(DataError, match=r"do not begin alike .*data\.columns: \{prompt: YOUR_COLUMN\}"):
        load([{"chosen": "abc", "rejected": "xyz"}])


@pytest.mark.parametrize(
    ("name", "values", "equal"),
    [
        ("scores", [0.5, 3, -1], [1, 1]),
        ("ranks", [2, 1, 3], [1, 1]),
        ("preferences", [[0.5, 0.4, 0.8], [0.6, 0.5, 0.9], [0.2, 0.1, 0.5]], [[0.5, 0.5], [0.5, 0.5]]),
    ],
    ids=["scores", "ranks", "preferences"],
)
def test_lists_give_their_best_and_worst_as_the_pair(load, name, values, equal):
    row = {"prompt": "p", "completions": [" a", " b", " c"], name: values}
    tied = {"prompt": "q", "completions": [" a", " b"], name: equal}
    data = load([row, tied])
    (found,) = data.train
    assert (found["chosen"], found["rejected"], found["completions"]) == (" b", " c", [" a", " b", " c"])
    assert found[name] == values
    assert data.describe["notes"][0] == f"1 of 2 lists were left out: all their {name} are equal"


def test_lists_of_another_length_are_named(load):
    row = {"prompt": "p", "completions": [" a", " b"], "scores": [1.0]}
    with pytest.raises(DataError, match=r"line 1: 2 completions and 1 scores"):
        load([row])
    for table, message in (([[0.5, 1]], "square table"), ([[0.5, 2], [0, 0.5]], r"numbers in \[0, 1\]")):
        wrong = {"prompt": "p", "completions": [" a", " b"], "preferences": table}
        with pytest.raises(DataError, match=f"line 1: column 'preferences' .* {message}"):
            load([wrong])


def test_equal_answers_are_left_out_and_empty_ones_kept_both_aloud(load):
    rows = [
        pair(1),
        {"prompt": "p", "chosen": "x", "rejected": "x"},
        {"prompt": "q", "chosen": "", "rejected": "y"},
    ]
    data = load(rows)
    assert len(data.train) == 2
    assert data.describe["notes"] == [
        "1 of 3 pairs were left out: chosen and rejected are the same text",
        "1 of 2 pairs have an empty answer; they are kept",
    ]
    with pytest.raises(DataError, match="all 1 pairs have a chosen answer equal"):
        load(rows[1:2])


def test_missing_columns_come_with_the_renaming(load):
    with pytest.raises(
        DataError, match=r"needs column 'prompt' \+ 'chosen' \+ 'rejected' or .*question"
    ) as caught:
        load([{"question": "q", "better": "a", "worse": "b"}])
    assert "data.columns: {prompt: question, chosen: better, rejected: worse}" in str(caught.value)
    with pytest.raises(DataError, match="holds nothing"):
        load([pair(1), {"prompt": "p", "chosen": None, "rejected": "b"}])
    with pytest.raises(DataError, match="'image' cannot be passed on"):
        load([pair(1, image="x")])


def test_label_noise_exchanges_a_share_of_training_rows_only(tmp_path):
    rows = [pair(index, score_chosen=2, score_rejected=1) for index in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = DataConfig(source=str(file), eval={"size": 5})
    noisy = plain.model_copy(
        update={"label_noise": DataConfig(source="x", label_noise={"share": 0.4}).label_noise}
    )
    data, clean = load_data(noisy, "preference"), load_data(plain, "preference")
    flipped = [a["chosen"] != b["chosen"] for a, b in zip(data.train, clean.train, strict=True)]
    assert sum(flipped) == 6  # of 15
    assert all(row["chosen"] == " bad" for row, flip in zip(data.train, flipped, strict=True) if flip)
    # scores say nothing about which rows it were
    assert set(data.train["score_chosen"][:]) == {2}
    assert data.eval.to_list() == clean.eval.to_list()
    assert data.describe["label_noise"] == {"rows": 15, "share": 0.4, "seed": 0, "flipped": 6}
    assert data.fingerprint != clean.fingerprint
    assert "6 of 15 training rows" in data.describe["notes"][-1]


def test_label_noise_from_a_file(load, tmp_path):
    flips = tmp_path / "flips.jsonl"
    flips.write_text('{"id": 3}\n{"id": 1}\n{"id": 99}\n')
    rows = [pair(index, id=index) for index in range(5)]
    data = load(rows, label_noise={"file": str(flips), "column": "id"})
    assert [row["id"] for row in data.train if row["chosen"] == " bad"] == [1, 3]
    assert "1 of its 3 values are not in the training rows" in data.describe["notes"][-1]
    with pytest.raises(DataError, match="no column 'nr'"):
        load(rows, label_noise={"file": str(flips), "column": "nr"})
    with pytest.raises(DataError, match="means none of the 1 training rows"):
        load([pair(7, id=7)], label_noise={"file": str(flips), "column": "id"})


@pytest.mark.parametrize(
    ("name", "values", "noisy"),
    [
        ("scores", [0.5, 3.0, -1.0], [0.5, -1.0, 3.0]),
        ("ranks", [2, 1, 3], [2, 3, 1]),
        (
            "preferences",
            [[0.5, 0.4, 0.8], [0.6, 0.5, 0.9], [0.2, 0.1, 0.5]],
            [[0.5, 0.8, 0.4], [0.2, 0.5, 0.1], [0.6, 0.9, 0.5]],
        ),
    ],
    ids=["scores", "ranks", "preferences"],
)
def test_label_noise_in_lists_exchanges_the_labels_of_best_and_worst(load, name, values, noisy):
    row = {"prompt": "p", "completions": [" a", " b", " c"], name: values}
    (found,) = load([row], label_noise={"share": 1.0}).train
    assert (found["chosen"], found["rejected"], found[name]) == (" c", " b", noisy)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_tokens_are_those_that_trl_trains_on(tmp_path, chat):
    tokenizer = support.tokenizer()
    rows = Dataset.from_list([pair(index, number=index) for index in range(4)]).remove_columns("number")
    if chat:
        tokenizer.chat_template = CHAT
        rows = render(rows, tokenizer, DataConfig(source="x"))
        assert rows[0]["rejected"] == [say("assistant", " bad")]
    arguments = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None
    )
    trainer = DPOTrainer(
        support.model(), support.model(), args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        chosen, rejected, begin = encode_pair(tokenizer, row, None)
        assert chosen[:begin] == rejected[:begin] == theirs["prompt_ids"]
        assert (chosen[begin:], rejected[begin:]) == (theirs["chosen_ids"], theirs["rejected_ids"])
        assert encode_scored(tokenizer, row["prompt"], row["chosen"]) == chosen


def test_lengths_are_counted_refused_or_left_out_never_dropped_in_silence():
    tokenizer = support.tokenizer()
    rows = Dataset.from_list(
        [{"prompt": "p" * n, "chosen": "a" * 4, "rejected": "b" * 9} for n in (2, 5, 12, 20)]
    )

    def apply(limit, policy="filter", **options):
        return apply_pair_lengths(rows, tokenizer, limit, policy, **{"whole": False, **options})

    # prompt and answer end at 12, 15, 22 and 30 tokens, the end token included
    kept, text, longest = apply(13)
    assert [len(row["prompt"]) for row in kept] == [2, 5, longest]
    assert "2 with an answer cut at 13, 1 left out" in text
    with pytest.raises(DataError, match=r"1 of 4 pairs have a prompt that leaves no room .* to 21"):
        apply(13, "refuse")
    kept, _, _ = apply(15, whole=True)
    assert [len(row["prompt"]) for row in kept] == [2, 5]
    with pytest.raises(DataError, match=r"2 of 4 pairs are longer than trainer.max_length=15 .* to 30"):
        apply(15, "refuse", whole=True)
    with pytest.raises(DataError, match="Nothing would be left"):
        apply(1, whole=True)
    with pytest.raises(DataError, match=r"30 tokens, more than the context .* trainer.max_length: 24"):
        apply(None, context=24)
    assert len(apply(24, context=24)[0]) == 4


def test_lists_go_through_chat_templates(load):
    row = {"prompt": "p", "completions": [" a", " b"], "scores": [0.5, 1]}
    data = load([row])
    spoken = render(data.train, SimpleNamespace(chat_template="x"), data.config)[0]
    assert spoken["completions"] == [[{"role": "assistant", "content": text}] for text in (" a", " b")]
    assert spoken["chosen"] == spoken["completions"][1]
