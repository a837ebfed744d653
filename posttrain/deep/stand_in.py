"""Rows as the run's own trainer encodes them, seen without its model.

What tokens a row becomes and which of them train is decided by TRL's trainers and ours, not here: the trainer
of the task is built on a stand-in, a decoder of a few weights with the vocabulary of the real one, and its
own preparation and collator are asked.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from posttrain.deep.subject import Subject
from posttrain.rl.ttrl import unlabelled
from posttrain.run.directory import RunDirectory
from posttrain.run.trainers import grpo_trainer, pair_trainer, sft_trainer, trl_config

_ROW = "posttrain_row"

# what decides tokens and labels; everything else in the section is about training or the machine
_FIELDS = (
    *("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field"),
    *("eos_token", "pad_token", "chat_template_path", "chat_template_kwargs", "dataset_kwargs"),
    *("pad_to_multiple_of", "max_completion_length", "mask_truncated_completions"),
)


@dataclass(frozen=True)
class Encoded:
    """One sequence as the model would get it.

    Attributes:
        row: Index of its row.
        part: ``chosen`` or ``rejected`` in tasks on pairs, else empty.
        ids: Token ids, after any cut, without padding.
        trained: Whether each of them is a target of the loss.
        length: Tokens before the cut.
    """

    row: int
    part: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    length: int

    @property
    def cut(self) -> int:
        """Tokens that were cut off."""
        return self.length - len(self.ids)


@dataclass(frozen=True)
class Encoding:
    """All rows encoded.

    Attributes:
        sequences: In the order of the rows; two for each pair.
        left_out: Rows that TRL drops, as nothing of them would train.
    """

    sequences: tuple[Encoded, ...]
    left_out: tuple[int, ...]


class StandIn:
    """The trainer of a run on a model of a few weights. Builds nothing outside a temporary folder.

    Args:
        subject: With model, tokenizer and rows.

    Raises:
        Exception: Whatever the trainer of the run would raise for these rows and settings.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.task = subject.config.task
        assert subject.rows is not None
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = self._build(RunDirectory(Path(folder)), subject.rows.select(range(1)))

    def encode(self, rows: Dataset) -> Encoding:
        """Return the rows as they enter training, for a supervised run or one on pairs."""
        rows = rows.add_column(_ROW, list(range(len(rows))))
        if self.task == "sft":
            uncut = copy.copy(self.trainer.args)
            uncut.max_length = None
            whole = self._prepare(rows, uncut)
            kept = self._prepare(whole, self.trainer.args)  # tokens are there already: it cuts and drops
        else:
            whole = kept = self._prepare(rows, self.trainer.args)  # the collator cuts
        lengths = {example[_ROW]: self._lengths(example) for example in whole}
        sequences = [
            encoded
            for example in kept
            for encoded in self._collated(example[_ROW], example, lengths[example[_ROW]])
        ]
        left_out = set(range(len(rows))) - {sequence.row for sequence in sequences}
        return Encoding(tuple(sequences), tuple(sorted(left_out)))

    def roll_out(self, rows: Dataset, answers: Sequence[str]) -> Encoding:
        """Return prompts as the reinforcement trainer gives them to the model, with stand-in answers.

        Args:
            rows: Rendered rows.
            answers: Text that stands for what the model would write, one per row; the end-of-turn token is
                put behind it, as a model that stops would.
        """
        trainer, tokenizer = self.trainer, self.subject.tokenizer
        size = trainer.num_generations
        inputs = [row for row in rows for _ in range(size)]
        written = {
            index: [*tokenizer(text, add_special_tokens=False)["input_ids"], trainer.eos_token_ids[0]]
            for index, text in enumerate(answers)
        }

        def write(prompts: list[Any], _: Any) -> dict[str, Any]:
            ids, *_rest = trainer._tokenize_prompts(prompts)
            own = [written[index // size][: trainer.max_completion_length] for index in range(len(prompts))]
            return {"prompt_ids": ids, "completion_ids": own, "logprobs": None}

        trainer.rollout_func = write
        batch = trainer._generate_and_score_completions(inputs)
        sequences = []
        for index in range(len(rows)):
            at = index * size
            prompt = batch["prompt_ids"][at][batch["prompt_mask"][at].bool()].tolist()
            written_mask = torch.arange(batch["completion_ids"].size(1)) < len(written[index])
            completion = batch["completion_ids"][at][written_mask].tolist()
            trained = batch["completion_mask"][at][written_mask].bool().tolist()
            sequences.append(
                Encoded(
                    index,
                    "",
                    (*prompt, *completion),
                    (*[False] * len(prompt), *trained),
                    len(prompt) + len(written[index]),
                )
            )
        return Encoding(tuple(sequences), ())

    # ---- building -----------------------------------------------------------------------------------------

    def _build(self, run: RunDirectory, rows: Dataset) -> Any:
        config, tokenizer = self.subject.config, self.subject.tokenizer
        given = {name: config.trainer[name] for name in _FIELDS if name in config.trainer}
        settings: dict[str, Any] = {
            "bf16": False,
            "fp16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        model = self._model()
        if self.task == "sft":
            settings |= {"shuffle_dataset": False, "packing": False, "padding_free": False}
            args = trl_config(SFTConfig, given | settings, run)
            return sft_trainer(run, args, model, tokenizer, rows)
        if self.subject.spec.pairs:
            kind = RewardConfig if self.subject.spec.scores else DPOConfig
            # of the reference nothing is needed
            settings |= {} if self.subject.spec.scores else {"precompute_ref_log_probs": False}
            args = trl_config(kind, given | settings, run)
            plain = config.model_copy(update={"methods": {}, "trainer": {}})
            return pair_trainer(plain, run, args, model, tokenizer, rows)
        settings |= {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        args = trl_config(GRPOConfig, given | settings, run)
        plain = config.model_copy(update={"methods": {}})
        return grpo_trainer(plain, run, args, model, tokenizer, rows, [unlabelled])

    def _model(self) -> Any:
        real = self.subject.model
        known = real.config.get_text_config()
        rows = int(real.get_input_embeddings().num_embeddings)
        shape: dict[str, Any] = {
            name: getattr(known, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        } | {
            "vocab_size": rows,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": getattr(known, "max_position_embeddings", 2048),
            "tie_word_embeddings": True,
        }
        settings = LlamaConfig(**shape)
        settings.num_labels = 1
        kind = LlamaForSequenceClassification if self.subject.spec.scores else LlamaForCausalLM
        with torch.random.fork_rng(devices=[]):
            model: Any = kind(settings)
        if not self.subject.spec.scores:
            model.generation_config = real.generation_config
        return model

    # ---- asking -------------------------------------------------------------------------------------------

    def _prepare(self, rows: Dataset, args: Any) -> Dataset:
        tokenizer = self.trainer.processing_class
        if self.task == "sft":
            return self.trainer._prepare_dataset(rows, tokenizer, args, False, None, "rows")
        return self.trainer._prepare_dataset(rows, tokenizer, args, "rows")

    def _lengths(self, example: dict[str, Any]) -> tuple[int, ...]:
        if self.task == "sft":
            return (len(example["input_ids"]),)
        shared = len(example.get("prompt_ids", ()))
        return shared + len(example["chosen_ids"]), shared + len(example["rejected_ids"])

    def _collated(self, row: int, example: dict[str, Any], lengths: tuple[int, ...]) -> list[Encoded]:
        batch = self.trainer.data_collator([example])
        parts = ("",) if self.task == "sft" else ("chosen", "rejected")
        sequences = []
        for index, part in enumerate(parts):
            real = batch["attention_mask"][index].bool()
            ids = batch["input_ids"][index][real].tolist()
            if "labels" in batch:
                trained = (batch["labels"][index][real] != -100).tolist()
            elif "completion_mask" in batch:
                trained = batch["completion_mask"][index][real].bool().tolist()
            else:  # a reward model reads its number off the last token
                trained = [place == len(ids) - 1 for place in range(len(ids))]
            if len(ids) > 1:
                trained[0] = False  # nothing predicts the first token
            sequences.append(Encoded(row, part, tuple(ids), tuple(trained), lengths[index]))
        return sequences
