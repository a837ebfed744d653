"""Ranked lists of responses in the DPO trainer: data, collator and the loss of a micro-batch.

TRL's ``_compute_loss`` takes chosen rows and rejected rows, half and half. A list has K rows, and K differs
between prompts, so this path has a loss of its own, with TRL's names for metrics. Preparation follows TRL's
for pairs (EOS after plain text, chat templates, the common prefix of prompt and completion, prompts that
fill ``max_length`` dropped), and truncation and padding are done by TRL's collator.
"""

from __future__ import annotations

import functools
import json
import logging
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from trl import DPOConfig
from trl.data_utils import _tokenize, common_prefix_length, is_conversational
from trl.trainer.utils import global_then_local_main_first

from posttrain.columns import ID
from posttrain.preference.lipo import labels_from_preferences, labels_from_ranks, pair_mask, unit_labels
from posttrain.preference.method import ListSettings
from posttrain.preference.seams import PairSeams
from posttrain.rl.quantiles import wide

logger = logging.getLogger(__name__)

RELEVANCE = ("scores", "ranks", "preferences")
"""Columns that say how good the responses are; one of them is needed."""

_PREPARED = ("prompt_ids", "completion_ids", "labels")
_REFERENCE = "ref_logps"
_LAYOUT = ("list_rows", "labels", "order_keys")
_PAIR_IDS = ("chosen_ids", "rejected_ids")
_STATISTICS = ("log_probs", "entropy", "mean_logits", "is_top1")


class ListError(ValueError):
    """Rows that are no lists of responses with labels; the message names the row."""


@dataclass
class Lists:
    """Which rows of a micro-batch form a list. B lists, K the longest, R rows.

    Attributes:
        rows: (B, K) int64 row of each response, in the order that breaks ties; any row where not valid.
        valid: (B, K) bool, False beyond the end of a list.
        labels: (B, K) fp32 psi; 0 where not valid.
        count: R.
        best: (B,) row of the highest label, the first in the data among equals.
        worst: (B,) row of the lowest, the last among equals.
        pairs: 0-dim, pairs per micro-batch, the mean over the micro-batches of the optimiser step and ranks.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    count: int
    best: torch.Tensor
    worst: torch.Tensor
    pairs: torch.Tensor

    @property
    def best_rows(self) -> torch.Tensor:
        """(R,) bool, True for the best row of each list."""
        chosen = torch.zeros(self.count, dtype=torch.bool, device=self.rows.device)
        return chosen.index_fill(0, self.best, True)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return (B, K) of (R,) values, 0 where there is no response."""
        return values[self.rows].masked_fill(~self.valid, 0.0)


def list_layout(inputs: dict[str, torch.Tensor], salt: int, pairs: torch.Tensor | None) -> Lists:
    """Return the lists of a micro-batch.

    Args:
        inputs: What :class:`ListCollator` adds.
        salt: Decides, with the tokens, the order of ties.
        pairs: See :class:`Lists`; None to count those of this micro-batch.
    """
    rows, labels = inputs["list_rows"], inputs["labels"]
    valid = rows >= 0
    rows = rows.clamp_min(0)
    given = labels[rows]
    best = given.masked_fill(~valid, -torch.inf).argmax(dim=1, keepdim=True)
    worst = rows.size(1) - 1 - given.masked_fill(~valid, torch.inf).flip(1).argmin(dim=1, keepdim=True)
    keys = _mixed(inputs["order_keys"], salt)[rows].masked_fill(~valid, torch.iinfo(torch.int64).max)
    order = keys.argsort(dim=1, stable=True)
    spread = given.masked_fill(~valid, 0.0).gather(1, order)
    valid = valid.gather(1, order)
    return Lists(
        rows=rows.gather(1, order),
        valid=valid,
        labels=spread,
        count=labels.numel(),
        best=rows.gather(1, best).squeeze(1),
        worst=rows.gather(1, worst).squeeze(1),
        pairs=pair_mask(spread, valid).sum().float() if pairs is None else pairs,
    )


def _mixed(keys: torch.Tensor, salt: int) -> torch.Tensor:
    """Return keys in another pseudo-random order for every salt (mixed as in splitmix64), >= 0."""
    mixed = keys + (salt * 0x9E3779B97F4A7C15) % 2**63
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        mixed = (mixed ^ ((mixed >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (mixed ^ ((mixed >> 31) & (2**33 - 1))) & (2**63 - 2)


def prepare_list(
    example: dict[str, Any], index: int, *, processing_class: Any, eos_token: str, settings: ListSettings
) -> dict[str, Any]:
    """Return ``prompt_ids``, ``completion_ids`` and ``labels`` of one prompt.

    The prompt ends where the first of its responses diverges from it, as TRL has it for pairs.

    Args:
        example: ``prompt``, ``completions`` and one of :data:`RELEVANCE`; ``tools`` and
            ``chat_template_kwargs`` as for TRL.
        index: Row of the data, for messages.
        processing_class: The tokenizer.
        eos_token: Ends a plain-text response that does not end with it.
        settings: Labels and size.

    Raises:
        ListError: No responses, responses without labels, or labels that are none.
    """
    try:
        labels = _labels(example, settings)
    except ValueError as error:
        begin = str(example["prompt"])[:60]
        raise ListError(f"row {index} of the lists: {error} (prompt {begin!r})") from error
    prompt, completions = example["prompt"], example["completions"][: settings.size]
    tools = example.get("tools")
    template = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }
    if is_conversational({"prompt": prompt}):
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **template)["input_ids"]
        whole = [
            _tokenize(processing_class, prompt + completion, **template)["input_ids"]
            for completion in completions
        ]
    else:
        prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
        texts = [text if text.endswith(eos_token) else text + eos_token for text in completions]
        whole = [_tokenize(processing_class, prompt + text)["input_ids"] for text in texts]
    length = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    if length < len(prompt_ids):
        _warn_of_boundary()
    return {
        "prompt_ids": list(prompt_ids[:length]),
        "completion_ids": [list(ids[length:]) for ids in whole],
        "labels": labels,
    }


@functools.cache
def _warn_of_boundary() -> None:
    logger.warning(
        "a prompt is not a prefix of prompt and response in tokens, so its end counts to the responses: end "
        "prompts on a token boundary, or use a chat template that renders them alike"
    )


def _labels(example: dict[str, Any], settings: ListSettings) -> list[float]:
    name = next(column for column in RELEVANCE if column in example)
    completions, values = example["completions"], example[name]
    if not completions:
        raise ValueError("completions is empty: leave the row out")
    if values is None or len(values) != len(completions):
        found = "none" if values is None else len(values)
        raise ValueError(f"{len(completions)} completions need as many {name}, found {found}")
    if name == "preferences":
        return unit_labels(labels_from_preferences(values)[: settings.size], settings.labels)
    values = values[: settings.size]
    return unit_labels(labels_from_ranks(values) if name == "ranks" else values, settings.labels)


def _pair_as_list(example: dict[str, Any]) -> dict[str, Any]:
    return {"completion_ids": [example[name] for name in _PAIR_IDS], "labels": [1.0, 0.0]}


def _flat(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """One response a row."""
    prompts = [
        p for p, lists in zip(batch["prompt_ids"], batch["completion_ids"], strict=True) for _ in lists
    ]
    ids = [[response] for responses in batch["completion_ids"] for response in responses]
    return {"prompt_ids": prompts, "completion_ids": ids, "labels": [[0.0]] * len(ids)}


class ListCollator:
    """Flattens lists to rows, list after list, and lets TRL's collator truncate and pad them.

    Adds ``list_rows`` (B, K) int64, the row of each response, -1 beyond the end of a list; ``labels`` (R,)
    fp32; ``order_keys`` (R,) int64, a hash of each row's tokens; ``pairs`` (1,) int64, how many pairs the
    labels order; and ``ref_logps`` (R,) if the reference's sums were computed before.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of lists."""
        # TRL's collator pads pairs: each response goes as a chosen one, beside a rejected one that is cut off
        rows = [
            {"prompt_ids": example["prompt_ids"], "chosen_ids": ids, "rejected_ids": ids[:1]}
            for example in examples
            for ids in example["completion_ids"]
        ]
        batch = {name: value[: len(rows)] for name, value in self.collator(rows).items()}
        sizes = [len(example["completion_ids"]) for example in examples]
        places = torch.full((len(examples), max(sizes)), -1)
        start = 0
        for row, size in zip(places, sizes, strict=True):
            row[:size] = torch.arange(start, start + size)
            start += size
        batch["list_rows"] = places
        batch["labels"] = torch.tensor(
            [label for e in examples for label in e["labels"]], dtype=torch.float32
        )
        batch["order_keys"] = torch.tensor(
            [zlib.crc32(array("q", row["prompt_ids"] + row["chosen_ids"]).tobytes()) for row in rows]
        )
        valid = places >= 0
        batch["pairs"] = pair_mask(batch["labels"][places], valid).sum().reshape(1)
        if _REFERENCE in examples[0]:
            batch[_REFERENCE] = torch.tensor([value for e in examples for value in e[_REFERENCE]])
        return batch


class ListPath(PairSeams):
    """TRL's trainer on lists, when ``list_settings`` is set before it is built."""

    list_settings: ListSettings | None = None
    lists: Lists | None = None
    _collates_lists = False
    _step_pairs: torch.Tensor | None = None

    # ---- data -------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        first = next(iter(dataset))
        listed = "completions" in first
        if dataset_name == "probe":  # pairs whatever trains
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self.list_settings is None:
            if listed and "chosen" not in first:
                raise ListError(
                    "the data have a column completions, lists of responses: add a method that trains on "
                    "them (lipo), or give pairs, columns chosen and rejected"
                )
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if "images" in first or "image" in first:
            raise ListError("lists are not defined for images: remove the column, or train on pairs")
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        if not listed:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            with global_then_local_main_first():
                return dataset.map(_pair_as_list, remove_columns=list(_PAIR_IDS), **options)
        missing = {"prompt", *RELEVANCE} - set(first)
        if "prompt" in missing or len(missing) != len(RELEVANCE) - 1:
            raise ListError(
                f"lists need the columns prompt, completions and one of {', '.join(RELEVANCE)}, found "
                f"{', '.join(first)}"
            )
        with global_then_local_main_first():
            dataset = dataset.map(
                prepare_list,
                with_indices=True,
                fn_kwargs={
                    "processing_class": processing_class,
                    "eos_token": self._tokenizer.eos_token,
                    "settings": self.list_settings,
                },
                **options,
            )
            if args.max_length is not None and args.truncation_mode == "keep_start":
                dataset = dataset.filter(
                    lambda row, length: len(row["prompt_ids"]) < length,
                    fn_kwargs={"length": args.max_length},
                    **options,
                )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self.list_settings is not None and self._signature_columns is None:
            self._signature_columns: Any = [*_PREPARED, _REFERENCE]
        super()._set_signature_columns_if_needed()

    @property
    def _mode(self) -> str:
        policy: Any = self.model
        return "train" if policy.training else "eval"

    def use_list_collator(self) -> None:
        """Put the collator of lists around TRL's, once."""
        if not self._collates_lists:
            self.data_collator = ListCollator(self.data_collator)
            self._collates_lists = True

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Compute the reference's sums, one response a row, so TRL's cache and gathering hold for them."""
        if self.list_settings is None or not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if name == "probe":
            ours: Any = self.data_collator
            self.data_collator = getattr(ours, "collator", ours)
            try:
                return super()._precompute_ref_logps(dataset, name, batch_size)
            finally:
                self.data_collator = ours
        self.use_list_collator()
        flat = dataset.map(_flat, batched=True, remove_columns=dataset.column_names)
        sums = super()._precompute_ref_logps(flat, name, batch_size)["ref_chosen_logps"]
        values, column = iter(sums), []
        for ids in dataset["completion_ids"]:
            column.append([next(values) for _ in ids])
        return dataset.add_column(_REFERENCE, column)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Return the reference's sums; for lists (R,) of all rows, twice."""
        if "list_rows" not in inputs:
            return super().compute_ref_log_probs(model, inputs)
        names = ("input_ids", "attention_mask", "completion_mask")
        sums = torch.cat(list(super().compute_ref_log_probs(model, {name: inputs[name] for name in names})))
        return sums, sums

    # ---- pairs of an optimiser step ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Collect the micro-batches of an optimiser step and count the pairs in all of them, over ranks."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.list_settings is not None and self.list_settings.counts_pairs and batches:
            pairs = torch.stack([batch["pairs"].to(device) for batch in batches]).sum().float()
            # the loss is divided by the micro-batches, gradients by the ranks
            self._step_pairs = self.accelerator.reduce(pairs, reduction="mean") / len(batches)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_pairs = None
        return loss

    # ---- loss -------------------------------------------------------------------------------------------

    def start_lists(self) -> None:
        """Finish the trainer for lists.

        Raises:
            ValueError: Something of this run is not defined for lists.
        """
        if self.list_settings is None:
            return
        self.use_list_collator()
        if self.compute_metrics is not None:
            raise ValueError("compute_metrics gets logits of pairs, which lists do not have: drop it")
        kind = self.accelerator.distributed_type
        if self.list_settings.forward_rows is not None and kind in (
            DistributedType.DEEPSPEED,
            DistributedType.FSDP,
            DistributedType.MEGATRON_LM,
        ):
            raise ValueError(
                f"forward_rows runs the model again in the backward, past {kind.value}: drop it and use "
                "gradient_checkpointing with fewer prompts a micro-batch, or launch with plain DDP"
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.list_settings is None:
            return super()._compute_loss(model, inputs, return_outputs)
        inputs = dict(inputs)
        self.ids = inputs.pop(ID, None)
        layout = {name: inputs.pop(name) for name in _LAYOUT}
        pairs, ref_sums = inputs.pop("pairs"), inputs.pop(_REFERENCE, None)
        completion = inputs.pop("completion_mask")
        self.mask, self.tokens = completion[..., 1:], inputs["input_ids"][..., 1:]
        self.lengths = completion.sum(dim=1)
        kwargs = {
            **inputs,
            "use_cache": False,
            "labels": inputs["input_ids"].masked_fill(completion == 0, -100),
            "fused_lm_head": True,
        }
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        outputs = self._forward(model, kwargs)
        logps = outputs["log_probs"]
        ref_logps = None
        if ref_sums is None:
            parts = [self._reference_forward(part).log_probs for part in self._parts(kwargs)]
            ref_logps = torch.cat(parts)[:, -self.mask.size(1) :]
            ref_sums = self.weighed_sums(ref_logps)
        sums = self.weighed_sums(logps)
        self.check_start(sums - ref_sums, self.mask)
        if self._mode == "train" and self._step_pairs is not None:
            pairs = self._step_pairs
        else:
            pairs = self.accelerator.reduce(pairs.sum().float(), reduction="mean")
        epoch = int(self.state.epoch or 0) if self._mode == "train" else 0
        self.lists = list_layout(layout, self.args.seed * 1_000_003 + epoch, pairs)
        correction = self.on_forward(outputs, logps, ref_logps, ref_sums)
        scores = sums - ref_sums
        if correction is not None:
            scores = scores + correction
        loss = self.on_loss(logps.new_zeros(()))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs["aux_loss"]
        self._log_lists(inputs, outputs, sums.detach(), self.beta * scores.detach())
        return loss

    def _parts(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the arguments of the model, ``forward_rows`` rows at a time."""
        assert self.list_settings is not None
        rows = len(kwargs["input_ids"])
        size = self.list_settings.forward_rows or rows
        for start in range(0, rows, size):
            yield {
                name: value[start : start + size] if isinstance(value, torch.Tensor) else value
                for name, value in kwargs.items()
            }

    def _forward(self, model: Any, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return (R, T) statistics of the tokens; activations of parts are made again in the backward."""
        parts = list(self._parts(kwargs))
        names = [*_STATISTICS, *(["aux_loss"] if self.aux_loss_enabled else [])]
        inner = self.accelerator.unwrap_model(model)

        # DDP has collectives in its forward, and ranks differ in their parts: it sees the first one, once
        called = [model]

        def run(part: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            outputs = (called.pop() if called else inner)(**part)
            return tuple(getattr(outputs, name) for name in names)

        if len(parts) == 1:
            results = [run(parts[0])]
        else:
            results = [checkpoint(run, part, use_reentrant=False) for part in parts]
        width = self.mask.size(1)
        whole = {}
        for name, values in zip(names, zip(*results, strict=True), strict=True):
            if name == "aux_loss":  # the mean over rows
                weights = [len(part["input_ids"]) / len(kwargs["input_ids"]) for part in parts]
                whole[name] = sum(w * value for w, value in zip(weights, values, strict=True))
            else:  # prompt learning puts virtual tokens before the real ones
                whole[name] = torch.cat(values)[:, -width:]
        return whole

    def _log_lists(
        self,
        inputs: dict[str, Any],
        outputs: dict[str, torch.Tensor],
        sums: torch.Tensor,
        rewards: torch.Tensor,
    ) -> None:
        """Log TRL's metrics, exact over ranks with one collective: best for chosen, worst for rejected."""
        lists, mask = self.lists, self.mask.bool()
        assert lists is not None
        spread, ordered = lists.spread(rewards), pair_mask(lists.labels, lists.valid)
        gaps = spread.unsqueeze(2) - spread.unsqueeze(1)
        everywhere = torch.ones_like(lists.best, dtype=torch.bool)
        # of each metric: numbers, and where they count
        metrics = {
            "entropy": (outputs["entropy"].detach(), mask),
            "mean_token_accuracy": (outputs["is_top1"][lists.best], mask[lists.best]),
            "rewards/accuracies": (gaps > 0, ordered),
            "rewards/margins": (gaps, ordered),
        }
        for name, rows in (("chosen", lists.best), ("rejected", lists.worst)):
            metrics[f"logits/{name}"] = outputs["mean_logits"].detach()[rows], mask[rows]
            metrics[f"rewards/{name}"] = rewards[rows], everywhere
            metrics[f"logps/{name}"] = sums[rows], everywhere
        numbers = [wide(torch.where(where, values, 0)).sum() for values, where in metrics.values()]
        counts = [wide(where).sum() for _, where in metrics.values()]
        tokens = wide(inputs["attention_mask"].sum())
        totals = self.accelerator.reduce(torch.stack([*numbers, *counts, tokens]), reduction="sum").tolist()
        mode = self._mode
        for name, total, count in zip(metrics, totals, totals[len(metrics) :], strict=False):
            if count > 0:
                self._metrics[mode][name].append(total / count)
        if mode == "train":
            self._total_train_tokens += int(totals[-1]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            aux = self.accelerator.reduce(outputs["aux_loss"].detach(), reduction="mean")
            self._metrics[mode]["aux_loss"].append(aux.item())
