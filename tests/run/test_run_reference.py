"""The start that a preference run is compared with."""

from __future__ import annotations

import pytest
import support

from posttrain.config.schema import RunConfig
from posttrain.run.directory import RunError
from posttrain.run.evaluating import reference_of


@pytest.fixture
def config(tmp_path):
    support.model().save_pretrained(tmp_path)
    support.tokenizer().save_pretrained(tmp_path)
    data = {"source": "pairs.jsonl"}
    return RunConfig(task="preference", run_dir="run", model={"path": str(tmp_path)}, data=data)


def test_a_start_with_the_same_tokens_is_given(config):
    more = support.tokenizer()
    more.add_tokens(["<one more>"])
    for tokenizer in (None, support.tokenizer(), more):
        with reference_of(config, tokenizer=tokenizer)() as start:
            assert start.config.vocab_size == support.model().config.vocab_size


def test_another_vocabulary_is_refused(config):
    other = support.tokenizer()
    other.get_vocab = lambda: {token: 1 + i for token, i in support.tokenizer().get_vocab().items()}
    other.name_or_path = "runs/other"
    with (
        pytest.raises(
            RunError, match=r"runs/other \(\d+ tokens\) .* of \d+ tokens 0 are the same .* Set model\.path to"
        ),
        reference_of(config, tokenizer=other)(),
    ):
        pass
