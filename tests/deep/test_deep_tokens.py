"""The token table is the trainer's own, and each way to spoil it is named with its cure."""

from __future__ import annotations

import pytest
from deep_runs import CHAT, checkpoint, finding, look, rows_file, section

ROWS = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(8)]


def sft(tmp_path, rows=ROWS, **model):
    data = rows_file(tmp_path / "rows.jsonl", rows)
    folder = checkpoint(tmp_path / "model", **model)
    return {"task": "sft", "model": {"path": str(folder)}, "data": {"source": str(data)}}


def shown(report, index=0):
    table = section(report, "tokens").facts["table"][index]["tokens"]
    return [(token["text"], token["role"], token["trained"]) for token in table]


def test_plain_rows(tmp_path):
    report = look(tmp_path, sft(tmp_path))
    assert shown(report) == [
        *((c, "prompt", False) for c in "0+1="),
        ("1", "completion", True),
        ("<eos>", "completion", True),
    ]
    assert section(report, "tokens").facts["table"][0]["place"] == f"{tmp_path}/rows.jsonl:1"
    assert report.ok
    assert [one.level for one in section(report, "tokens").findings] == ["note"]


def test_chat_rows_have_the_roles_of_their_messages(tmp_path):
    report = look(tmp_path, sft(tmp_path, template=CHAT))
    roles = dict.fromkeys((role, trained) for _, role, trained in shown(report))
    assert list(roles) == [("user", False), ("assistant", True)]
    assert shown(report)[-1] == ("<eos>", "assistant", True)
    assert section(report, "tokens").findings == ()


def test_pairs_show_both_answers(tmp_path):
    rows = [{"prompt": "a:", "chosen": "b", "rejected": "cc"}]
    config = sft(tmp_path, rows) | {"task": "preference"}
    report = look(tmp_path, config)
    assert shown(report, 0)[2:] == [("b", "chosen", True), ("<eos>", "chosen", True)]
    assert shown(report, 1)[2:] == [*[("c", "rejected", True)] * 2, ("<eos>", "rejected", True)]
    scored = look(tmp_path, config | {"task": "reward"})
    assert [trained for *_, trained in shown(scored, 1)] == [False] * 4 + [True]


def test_rollouts_train_what_the_model_writes(tmp_path):
    rows = [{"prompt": "2+2=", "answer": "4"}] * 4
    config = sft(tmp_path, rows) | {"task": "rlvr", "rewards": ["math"]}
    assert [trained for *_, trained in shown(look(tmp_path, config))] == [False] * 4 + [True] * 2
    report = look(
        tmp_path, config, "trainer.max_completion_length=1", "trainer.mask_truncated_completions=true"
    )
    assert not any(trained for *_, trained in shown(report))
    assert finding(report, "tokens", "no token that trains").level == "error"
    assert finding(report, "data", "gold answers do not fit").level == "error"


@pytest.mark.parametrize(
    ("template", "level", "words"),
    [
        (
            CHAT.replace("<eos>", "<|end|>"),
            "warning",
            "end with '<|end|>', at which generation does not stop",
        ),
        (CHAT.replace("<eos>", ""), "warning", "have no end token"),
        (CHAT.replace("<assistant>{% endif %}", "<assistant>thinks{% endif %}"), "warning", "prompt alone"),
    ],
)
def test_templates_that_do_not_teach_to_stop(tmp_path, template, level, words):
    report = look(tmp_path, sft(tmp_path, template=template, end="<|end|>"))
    found = finding(report, "tokens", words)
    assert found.level == level
    assert found.cure
    assert found.examples[0].startswith(f"{tmp_path}/rows.jsonl:1: ")


def test_an_end_that_is_masked(tmp_path):
    template = CHAT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    report = look(tmp_path, sft(tmp_path, template=template), "trainer.assistant_only_loss=true")
    assert finding(report, "tokens", "is not trained in 8 of 8").level == "error"
    assert not report.ok


def test_a_text_that_begins_twice(tmp_path):
    rows = [{"text": "<bos>once"}, {"text": "once"}]
    report = look(tmp_path, sft(tmp_path, rows, bos=True))
    assert finding(report, "tokens", "begin with '<bos>' twice").message.startswith("1 of 2 (50.0%)")
    assert finding(report, "tokens", "name of a special token").examples == (
        f"{tmp_path}/rows.jsonl:1: '<bos>'",
    )


def test_characters_the_vocabulary_lacks(tmp_path):
    report = look(tmp_path, sft(tmp_path, [{"prompt": "a", "completion": "é and é"}, ROWS[0]]))
    assert "1 of 2 (50.0%) sequences hold 2 unknown tokens" in finding(report, "tokens", "unknown").message


def test_what_the_trainer_refuses_is_told(tmp_path):
    report = look(tmp_path, sft(tmp_path, template=CHAT), "trainer.assistant_only_loss=true")
    assert "assistant_only_loss" in finding(report, "tokens", "the trainer refuses the rows").cure
    # the rest is looked at all the same
    assert section(report, "batch").facts["steps_per_epoch"] == 1


def test_a_tokenizer_of_another_model(tmp_path):
    config = sft(tmp_path)
    vocabulary = checkpoint(tmp_path / "other", end="<|end|>")
    config["model"]["tokenizer"] = str(vocabulary)
    assert "embedding rows" in finding(look(tmp_path, config), "tokens", "ids from 100").message
