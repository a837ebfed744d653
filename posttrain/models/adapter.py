"""From the ``adapter`` section of a configuration to a PEFT configuration that is known to match the "
"model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, TaskType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.schema import AdapterConfig
from posttrain.patterns import UNREADABLE, SlowPatternError, limited


def build_peft_config(adapter: AdapterConfig, model: PreTrainedModel) -> LoraConfig:
    """Return the PEFT configuration of ``adapter``, checked against the modules of ``model``.

    ``alpha`` is twice the rank when unset. Where the model ties its embeddings and one of the two is among
    the trained modules, PEFT is told to keep them tied (``ensure_weight_tying``); it would otherwise train
    one copy, and a merged checkpoint could not hold both.

    Raises:
        ValueError: A name of ``target_modules`` or ``modules_to_save`` matches no module (PEFT itself only
            complains when *none* of the names matches), or a module is in both; the message lists the names
            that exist. Or a regular expression has no end on one of them.
    """
    scores = type(model).__name__.endswith("ForSequenceClassification")
    targets = adapter.target_modules
    linear = _names(model, (nn.Linear, Conv1D))
    if targets != "all-linear":
        adaptable = _names(model, (nn.Linear, Conv1D, nn.Embedding))
        if isinstance(targets, str):
            if not any(_matched(targets, adaptable)):
                hint = f" For a module name write a list: [{targets}]." if targets.isidentifier() else ""
                raise ValueError(
                    f"adapter.target_modules: the regular expression {targets!r} matches no module; it "
                    f"has to match the full name, for example {adaptable[-1]!r}.{hint} "
                    f"{_found('Linear layers', linear)}"
                )
        else:
            _refuse_unmatched("target_modules", targets, adaptable, _found("Linear layers", linear))
    if adapter.modules_to_save is not None:
        modules = [name for name, _ in model.named_modules() if name]
        _refuse_unmatched("modules_to_save", adapter.modules_to_save, modules, _found("Modules", modules))
        if not isinstance(targets, str) and (both := sorted(set(targets) & set(adapter.modules_to_save))):
            raise ValueError(
                f"adapter: {both} are in target_modules and in modules_to_save; a module is either "
                f"adapted or trained in full: drop one of the two"
            )
    return LoraConfig(
        # PEFT then trains the head of a reward model in full
        task_type=TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM,
        r=adapter.r,
        # PEFT accepts any number here although its annotation says int
        lora_alpha=2 * adapter.r if adapter.alpha is None else adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=adapter.modules_to_save,
        ensure_weight_tying=_touches_tied_embeddings(adapter, model),
    )


def _names(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except UNREADABLE as error:
        raise ValueError(
            f"adapter.target_modules: {pattern!r} is not a regular expression ({error}); write "
            f"'all-linear', a regular expression or a list of module names"
        ) from error


def _matched(pattern: str, names: Sequence[str]) -> list[bool]:
    expression = _regex(pattern)
    try:
        return [limited(expression, "fullmatch", name) is not None for name in names]
    except SlowPatternError as error:
        raise ValueError(f"adapter.target_modules: {error}") from None


def _matches(ending: str, name: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _refuse_unmatched(field: str, endings: Sequence[str], names: Sequence[str], found: str) -> None:
    missing = [ending for ending in endings if not any(_matches(ending, name) for name in names)]
    if missing or not endings:
        what = f"no module is called {missing}" if missing else "the list is empty"
        raise ValueError(f"adapter.{field}: {what}. {found}")


def _found(what: str, names: Sequence[str]) -> str:
    """Describe modules by their distinct last name parts: forty layers have the same seven."""
    endings = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    return f"{what} of this model: {', '.join(endings) or 'none'}."


def _touches_tied_embeddings(adapter: AdapterConfig, model: PreTrainedModel) -> bool:
    output = model.get_output_embeddings()
    if output is None or output.weight is not model.get_input_embeddings().weight:
        return False
    tied = [
        name for name, module in model.named_modules() if module in (output, model.get_input_embeddings())
    ]
    endings = list(adapter.modules_to_save or [])
    if isinstance(adapter.target_modules, list):
        endings += adapter.target_modules
    elif adapter.target_modules != "all-linear" and any(_matched(adapter.target_modules, tied)):
        return True
    return any(_matches(ending, name) for ending in endings for name in tied)
