r"""The selector protocol: from a model, and perhaps data, to a plan of what may move.

A selector is a pydantic model whose fields are the configuration, typed and ranged; they can be read without
importing torch. To add one, write one file in ``posttrain/selection/`` with a subclass of :class:`Selector`
or :class:`ElementSelector`; it is found by its ``name``. Its module docstring is its documentation page.

Candidates
    Every parameter that is trainable when :meth:`Selector.select` is called, each tied tensor once, by its
    first name. Frozen parameters are none, so with LoRA the adapter's matrices are the candidates; to draw
    again, undo the previous selection first. Quantised weights (integers, 8-bit floats, packed 4-bit) are
    none either. ``include`` and ``exclude`` narrow the candidates: regular expressions, searched in the
    parameter's full name, in all its names if it is tied. A pattern that matches nothing is an error.

    Element selectors rank over *all* candidates, as the official codes do: token embeddings, output head and
    norms too, unless ``embeddings`` or ``norms`` say otherwise.

The same plan on every rank
    Draws come from a CPU generator seeded with the selector's name, its seed and the round; scores from equal
    weights and equal examples are equal, and ties go to the lowest (tensor, flat position).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from posttrain._lazy import torch
from posttrain.patterns import UNREADABLE, SlowPatternError, limited
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.top_b import budget_of

if TYPE_CHECKING:
    from torch import nn

    Batch = Mapping[str, torch.Tensor]
    Batches = Iterable[Batch] | Mapping[str, Iterable[Batch]]

Granularity = Literal["tensor", "element"]
"""Whether a plan freezes whole tensors (``tensor``) or may pick single scalars of them (``element``)."""

Need = Literal["nothing", "gradients", "examples", "checkpoints"]
"""What a selector looks at beside the weights.

``nothing``: at nothing else. ``gradients``: at the gradient of every step. ``examples``: at examples that are
given to :meth:`Selector.select` as ``batches``. ``checkpoints``: at files or folders named in its fields.
"""

Schedule = Literal["static", "round", "shrink", "grow"]
"""When the selection changes: never, with the round (it is drawn again), once in mid-run, at every step."""


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except UNREADABLE as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiled)]
"""A regular expression, searched (not matched whole) in names like ``model.layers.0.mlp.up_proj.weight``."""


def _counted(budget: object) -> object:
    # pydantic would take 1.0, meant as all of them, and True for one scalar
    what = "a whole number of scalars from 1 on, or a fraction of the candidates above 0 and below 1"
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"a budget is {what}, found {budget!r}")
    if isinstance(budget, int) and budget >= 1:
        return budget
    if isinstance(budget, float) and 0 < budget < 1:
        return budget
    fix = ""
    if budget == 1:
        fix = ": write 1 for one scalar; to train all of them, drop the selection"
    elif budget > 1 and float(budget).is_integer():
        fix = f": write {int(budget)}"
    raise ValueError(f"a budget is {what}, found {budget!r}{fix}")


Budget = Annotated[int | float, BeforeValidator(_counted)]
"""A number of scalars, or a fraction of the candidates: floor(fraction * n)."""


class Selector(BaseModel):
    """Base class of every selector.

    Subclasses set ``name``, ``title`` and ``paper``, say what they need, declare their parameters as pydantic
    fields and override :meth:`select`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None] = None
    granularity: ClassVar[Granularity] = "tensor"
    needs: ClassVar[Need] = "nothing"
    schedule: ClassVar[Schedule] = "static"
    groups: ClassVar[tuple[str, ...]] = ()
    """Names of the sets in which examples are needed, such as forget and retain; () for one set."""

    include: tuple[Pattern, ...] = Field(
        (), description="Only parameters in whose name one of these regular expressions is found; () for all."
    )
    exclude: tuple[Pattern, ...] = Field(
        (), description="Never parameters in whose name one of these regular expressions is found."
    )

    def select(self, model: nn.Module, *, round: int = 0, batches: Batches | None = None) -> SelectionPlan:
        """Return what may move.

        Args:
            model: Unwrapped, with whole weights; trainable is what ``requires_grad`` says.
            round: Index of the training round (a task of a sequence, or SFT and then DPO).
            batches: Examples, where :attr:`needs` says ``examples`` (by :attr:`groups`, if there are any):
                dictionaries of (B, T) tensors ``input_ids``, ``labels`` (-100 where nothing is learned) and
                optionally ``attention_mask``.

        Raises:
            PlanError: Nothing can be selected, or the selector does not fit the model; the message says why.
            ValueError: The budget is impossible, or examples are missing.
        """
        raise NotImplementedError

    def candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that may be selected, in the order of ``named_parameters()``.

        Raises:
            PlanError: A pattern matches nothing, nothing is left, the weights are partitioned, or packed by a
                selection that is still in force.
        """
        from posttrain.selection.packed import packed_tensors

        names = all_names(model)
        parameters = dict(model.named_parameters())
        _refuse_partitioned(parameters)
        if next(packed_tensors(model), None) is not None:
            raise PlanError(
                "a selection is in force in this model, so its candidates are hidden: leave it first "
                "(Selection.remove, or end_selection of the trainer)"
            )
        usable = {name: p for name, p in parameters.items() if p.requires_grad and not is_quantised(p)}
        kept = dict(usable)
        if self.include:
            chosen = matching(self.include, names, "include")
            kept = {name: p for name, p in kept.items() if name in chosen}
        if self.exclude:
            gone = matching(self.exclude, names, "exclude")
            kept = {name: p for name, p in kept.items() if name not in gone}
        if not kept:
            raise PlanError(
                f"{self.name} finds no candidates: of {len(parameters)} parameters {len(usable)} are "
                f"trainable and not quantised, and include={list(self.include)}, "
                f"exclude={list(self.exclude)} leave none. Unfreeze what is to be selected from, or change "
                "the patterns."
            )
        return kept

    def plan(
        self,
        model: nn.Module,
        selected: Mapping[str, TensorSelection],
        *,
        round: int = 0,
        **about: Any,
    ) -> SelectionPlan:
        """Return ``selected`` as a plan that says what it was made with; ``about`` is added to its config."""
        config = self.model_dump(mode="json") | {"round": round} | about
        return SelectionPlan.for_model(model, selected, method=self.name, config=config)

    def generator(self, round: int, seed: int) -> torch.Generator:
        """Return the CPU generator of a round: the same on every rank, another one for every round."""
        digest = hashlib.sha256(f"{self.name} {seed} {round}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class ElementSelector(Selector):
    """Base class of selectors that pick single scalars over all candidates within one budget."""

    granularity: ClassVar[Granularity] = "element"

    budget: Budget | None = Field(
        None, description="Scalars that may move: a number, or a fraction of the candidates."
    )
    embeddings: bool = Field(True, description="Token embeddings and the output head are candidates.")
    norms: bool = Field(True, description="Weights and biases of norms are candidates.")
    always_train: tuple[Pattern, ...] = Field(
        (), description="Parameters that train whole, such as a fresh head; charged to the budget."
    )

    def candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that may be selected from, see :meth:`Selector.candidates`."""
        kept = super().candidates(model)
        if not self.embeddings:
            out = embedding_names(model)
            kept = {name: p for name, p in kept.items() if name not in out}
        if not self.norms:
            out = norm_names(model)
            kept = {name: p for name, p in kept.items() if name not in out}
        if not kept:
            raise PlanError(
                f"{self.name} finds no candidates beside embeddings and norms; allow them, or change include "
                "and exclude"
            )
        return kept

    def split(self, model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter], int | None]:
        """Return the candidates to be ranked, those that train whole, and the scalars left to be ranked.

        The last is None when there is no budget.

        Raises:
            PlanError: A pattern of ``always_train`` matches no candidate.
            ValueError: The budget is impossible, or used up by what trains whole.
        """
        kept = self.candidates(model)
        whole: dict[str, nn.Parameter] = {}
        if self.always_train:
            names = {name: known for name, known in all_names(model).items() if name in kept}
            chosen = matching(self.always_train, names, "always_train")
            whole = {name: p for name, p in kept.items() if name in chosen}
        ranked = {name: p for name, p in kept.items() if name not in whole}
        if self.budget is None:
            return ranked, whole, None
        total = budget_of(self.budget, sum(p.numel() for p in kept.values()))
        charged = sum(p.numel() for p in whole.values())
        if charged >= total:
            raise ValueError(
                f"always_train takes {charged:,} scalars, the whole budget of {total:,}: raise the budget or "
                "train less whole"
            )
        return ranked, whole, total - charged

    def elements(
        self,
        model: nn.Module,
        chosen: Mapping[str, torch.Tensor],
        whole: Iterable[str] = (),
        *,
        round: int = 0,
        **about: Any,
    ) -> SelectionPlan:
        """Return the plan of flat positions per tensor and of tensors that train whole."""
        parameters = dict(model.named_parameters())
        selected = {name: TensorSelection.elements(parameters[name].shape, i) for name, i in chosen.items()}
        selected |= {name: TensorSelection.all(parameters[name].shape) for name in whole}
        return self.plan(model, selected, round=round, **about)


# ---- names -----------------------------------------------------------------------------------------------


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """Return every name of each parameter, by its first name."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def matching(patterns: Iterable[str], names: Mapping[str, Iterable[str]], what: str) -> set[str]:
    """Return the keys of which some name is found by one of ``patterns``.

    Raises:
        PlanError: A pattern finds none; the message shows what there is.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            name for name, known in names.items() if any(searched(pattern, other, what) for other in known)
        }
        if not hits:
            shown = [name for name, _ in zip(names, range(3), strict=False)]
            raise PlanError(
                f"{what}: {pattern!r} is found in none of {len(names)} names, such as {', '.join(shown)}. "
                "Correct the pattern or remove it."
            )
        found |= hits
    return found


def searched(pattern: str, name: str, what: str) -> bool:
    """Whether ``pattern``, given as the setting ``what``, is found in ``name``.

    Raises:
        PlanError: The search has no end.
    """
    try:
        return limited(re.compile(pattern), "search", name) is not None
    except SlowPatternError as error:
        raise PlanError(f"{what}: {error}") from None


def module_names(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the modules that own each parameter, by the parameter's first name."""
    return {name: [other.rpartition(".")[0] for other in known] for name, known in all_names(model).items()}


def embedding_names(model: nn.Module) -> set[str]:
    """Return the parameters of embeddings and of the output head."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            modules.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    ids = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def norm_names(model: nn.Module) -> set[str]:
    """Return the parameters of modules whose class is called a norm (RMSNorm, LayerNorm, ...)."""
    ids = {
        id(p)
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
        for p in module.parameters(recurse=False)
    }
    return {name for name, p in model.named_parameters() if id(p) in ids}


# ---- weights ---------------------------------------------------------------------------------------------


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds codes instead of numbers that an optimiser could move."""
    dtype = parameter.dtype
    return not dtype.is_floating_point or dtype.itemsize < 2 or hasattr(parameter, "quant_state")


def _refuse_partitioned(parameters: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id") or parameter.is_meta:
            state = "partitioned by ZeRO-3" if hasattr(parameter, "ds_id") else "not loaded (meta device)"
            raise PlanError(
                f"{name} is {state}, so there is nothing to select from. Make the plan from the whole model "
                "in one process, save it, and give the file to the run."
            )
