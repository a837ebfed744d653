r"""HFT: half fine-tuning, a new random half of the matrices in each round (arXiv 2404.18466).

Idea
    Full fine-tuning overwrites what a model knew. Putting a random half of a tuned model's matrices back to
    the base brings most of that knowledge back and keeps most of the new skill (:func:`half_reset`). HFT
    makes it a training rule: in a round (a task of a sequence, or SFT and then DPO) half of the matrices of
    every block train and the others are frozen; the next round draws anew, independently.

Formula
    The matrices of a block form categories: attention {q, k, v, o}, feed-forward {gate, up, down}, and its
    norms. Of a category of n matrices over L blocks, with n p = k + f and 0 <= f < 1::

        k     matrices train in every block, drawn without replacement, independently per block
        k + 1 in floor(L f + 1/2) of the blocks, which are drawn independently per category

    At p = 0.5: 2 of 4, 1 or 2 of 3 (each in half of the blocks), 1 of 2. The loss is untouched, and

        theta_S <- theta_S - lr AdamW(g_S),    theta_F unchanged    (F: frozen)

    Counted are matrices; a bias follows its matrix. Blocks in which a category has another n (a dense layer
    in front of experts) are a draw of their own.

Levels
    ``category`` is the above. ``layer``: all matrices of floor(L p + 1/2) blocks. ``model``: floor(n p + 1/2)
    of all matrices and block norms, without any balance. Both are ablations of the paper, and weaker there.

Defaults and where they come from
    ratio 0.5 and ``category`` (paper, as reported in secondary notes: no official code was found). Token
    embeddings and output head train (reported; freezing them is worse). Final norm: not stated, trains here.
    The rule for odd categories and other ratios is ours and gives the reported counts at 0.5.

What counts as what
    A block is what lies under the first number in a name (``model.layers.3.``). In it, what the module's
    class calls a norm is one, QK-norms included; of the rest what ``attention`` or ``feed_forward`` finds is
    that. A fused tensor is one matrix: {qkv, o} is a category of 2. Whatever is left in a block is an error,
    as is a category without matrices; ``categories`` leaves one out on purpose, its tensors then are frozen.
    ``always_train`` is searched in *module* names and comes first; what lies outside of blocks and is not in
    it is frozen.

Grouped-query attention
    Two of four matrices are not half of the scalars there: with 32 heads and 8 key-value heads {q, o} hold
    0.8 of them, {k, v} 0.2. The share that trains is logged. ``balance="scalars"`` draws among matrices of
    one size: of {q, o} and of {k, v}, at 0.5 one of each.

Mixture of experts
    The paper has none. ``experts="each"`` draws half of the experts, separately for gate, up and down (gate
    and up together where they are fused); of tensors that stack all experts that is a plan of rows, enforced
    scalar by scalar. ``"whole"`` takes a projection of all experts as one matrix, so that freezing whole
    tensors will do. Whether the ``router`` trains has to be said.

Needs
    Nothing beside the weights. Gradients and optimiser state exist for the trained half only; time falls
    by at most 1/6 of the FLOPs, the weight gradients of the other half (the paper reports 30 %).

Composes with
    Every loss and trainer, gradient accumulation, DDP, DeepSpeed. With an adapter it halves the
    adapter, undocumented by the paper: ``categories: [attention, feed_forward], always_train: []``; the A and
    B of a module count as one matrix. A new half within a run needs a new optimiser: use one run per round.

When not to use it
    - On a small or large-vocabulary model to save memory: with trained embeddings "half" is 51.9 % of a
      Llama-2 7B, 56.5 % of a Llama-3 8B and 63.8 % of a Qwen2.5 0.5B.
    - When forgetting does not matter and the new task is all.

What to watch
    The log: trained matrices and their share of the scalars, per category. After a round, the loss on older
    data against that of full fine-tuning.

Official code
    None was found. A third-party version draws once per run, not per round, and lets ``L // 2`` blocks train
    one of three feed-forward matrices, as the rule above does.

Evidence at laptop size
    ``configs/continual/words.yaml`` (its first lines are the command): the embedded model learns words
    spelled backwards from scratch (held-out accuracy 0.849), then sums, in 400 steps at 5e-4; all arms of a
    seed begin from the same model. Five seeds (42 to 46), mean and 95 % t interval, differences paired by
    seed; one CPU core. ``lora``: rank 16 at 1e-3. The general loss is the NLL (nats) per answer token on
    held-out words, 0.19 before the second task::

                 sums, accuracy             words, accuracy           general loss
        full      0.453 [0.398, 0.508]       0.001 [-0.002, 0.004]     5.20 [4.14, 6.26]
        hft      -0.027 [-0.095, 0.041]     +0.204 [0.029, 0.379] *   -3.99 [-4.60, -3.37] *
        lora     -0.220 [-0.301, -0.139] *  +0.044 [-0.049, 0.137]    -2.55 [-4.18, -0.92] *

    and with half the rate and twice the steps::

        full      0.646 [0.559, 0.733]       0.062 [-0.020, 0.144]     2.41 [1.35, 3.47]
        hft      -0.092 [-0.260, 0.076]     +0.355 [0.139, 0.571] *   -1.74 [-2.45, -1.03] *

    The claim shows: at an accuracy on the new task that does not differ, less is forgotten, on every seed and
    at both rates. A lower rate helps full fine-tuning too: compare HFT with the best schedule, not with one.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.selector import Pattern, Selector, matching, module_names, norm_names, searched

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

Category = Literal["attention", "feed_forward", "norm"]

_ROUTER = re.compile(r"(?<!\w)(gate|router|shared_expert_gate)$")
_EXPERT = re.compile(r"(?<=experts)\.\d+(?=\.)")
_ADAPTER = re.compile(r"\.lora_\w+(\..*)?$")
_KEY_VALUE = re.compile(r"(?<![a-z])(k|v|key|value)(?![a-z])[^.]*$")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What is drawn as one.

    Attributes:
        key: Name of the module, or of the tensor where one module holds several.
        block: Stack (``model.layers``) and number.
        category: attention, feed_forward or norm.
        pool: Matrices of a block with equal pools are drawn from together.
        parts: Parameters with the first and last row (exclusive) that belong to it; None for all of it.
        scalars: Biases included.
    """

    key: str
    block: tuple[str, int]
    category: str
    pool: str
    parts: tuple[tuple[str, tuple[int, int] | None], ...]
    scalars: int

    @property
    def label(self) -> str:
        """The name within its block."""
        return self.key.removeprefix(f"{self.block[0]}.{self.block[1]}.")


class HFT(Selector):
    """Train a random half of the matrices of every block. See the module page."""

    name = "hft"
    title = "HFT: a random half of the matrices of every block, drawn anew each round"
    paper = "2404.18466"
    schedule = "round"

    ratio: float = Field(
        0.5, ge=0, le=1, description="Part of the matrices that trains; 0.3-0.7 is sensible."
    )
    level: Literal["category", "layer", "model"] = Field(
        "category",
        description="Balance: per category and block; whole blocks; none. The last two are ablations.",
    )
    balance: Literal["matrices", "scalars"] = Field(
        "matrices", description="scalars draws among matrices of one size, for grouped-query attention."
    )
    categories: tuple[Category, ...] = Field(
        ("attention", "feed_forward", "norm"),
        min_length=1,
        description="What is drawn from; the tensors of categories left out are frozen.",
    )
    always_train: tuple[Pattern, ...] = Field(
        (
            r"embed_tokens|wte|wpe|embed_in|word_embeddings",
            r"lm_head|embed_out|(?<!\w)score$",
            r"(?<!\w)(norm|ln_f|final_layer_?norm)$",
        ),
        description="Modules that train in every round, by regular expressions searched in module names.",
    )
    attention: Pattern = Field("(?i)attn|attention", description="Finds attention matrices in a block.")
    feed_forward: Pattern = Field(
        "(?i)mlp|feed_?forward|ffn|moe|expert", description="Finds feed-forward matrices in a block."
    )
    experts: Literal["each", "whole"] = Field(
        "each", description="Draw experts one by one, or a projection of all experts as one matrix."
    )
    router: Literal["train", "freeze"] | None = Field(
        None, description="Whether routers of experts train; has to be said where there are any."
    )
    seed: int = Field(0, ge=0, description="Of the draw, together with the round.")

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the half that trains in ``round``, see :meth:`Selector.select`."""
        del batches
        kept = self.candidates(model)
        modules = {name: known for name, known in module_names(model).items() if name in kept}
        always = matching(self.always_train, modules, "always_train") if self.always_train else set()
        shapes = {name: tuple(parameter.shape) for name, parameter in kept.items()}
        matrices, routers = self.matrices(shapes, norm_names(model), always)
        chosen = draw(matrices, self.ratio, self.generator(round, self.seed), level=self.level)
        trained = shares(matrices, chosen)
        for category, line in trained.items():
            members = sorted({re.sub(r"\.\d+", ".*", m.label) for m in matrices if m.category == category})
            logger.info(
                "hft round %d, %s {%s}: %d of %d matrices, %.1f %% of their scalars (blocks %.1f to %.1f %%)",
                round, category, ", ".join(members), line["trained"], line["matrices"],
                100 * line["share"], 100 * line["least"], 100 * line["most"],
            )  # fmt: skip
        selected = selection_of(chosen, shapes)
        whole = always | (routers if self.router == "train" else set())
        selected |= {name: TensorSelection.all(shapes[name]) for name in whole}
        return self.plan(model, selected, round=round, trained=trained)

    def matrices(
        self, shapes: Mapping[str, tuple[int, ...]], norms: set[str], always: set[str]
    ) -> tuple[list[Matrix], set[str]]:
        """Sort parameters into what is drawn from; a pure function of names and shapes.

        Args:
            shapes: Of every parameter that may be selected, in the order of ``named_parameters()``.
            norms: Names of those that belong to norms.
            always: Names of those that train anyway.

        Returns:
            The matrices in order, and the parameters of routers.

        Raises:
            PlanError: A category has no matrices, a parameter of a block belongs to none, or there are
                routers and ``router`` is not set.
        """
        units: dict[str, list[str]] = {}
        for name in shapes:
            if name not in always and _block(name) is not None:
                units.setdefault(_unit(name, shapes), []).append(name)
        mixtures = {_block(key) for key in units if "expert" in key}
        found: list[Matrix] = []
        routers: set[str] = set()
        unknown: list[str] = []
        for key, names in units.items():
            block = _block(key)
            assert block is not None
            category = self._category(key, block, names, norms)
            if category == "feed_forward" and block in mixtures and _ROUTER.search(key):
                routers |= set(names)
            elif category is None or (
                category != "norm" and not any(len(shapes[name]) > 1 for name in names)
            ):
                unknown += names
            elif category in self.categories:
                found += self._drawn(key, block, category, {name: shapes[name] for name in names})
        if unknown:
            raise PlanError(
                f"hft does not know what {len(unknown)} parameters of the blocks are, first {unknown[0]}: "
                "name their modules in always_train, leave them out with exclude (they are frozen then), or "
                "widen the patterns attention and feed_forward"
            )
        if routers and self.router is None:
            raise PlanError(
                f"the model routes between experts ({sorted(routers)[0]}), and the paper does not say "
                "whether routers train: set router to 'train' or 'freeze'"
            )
        for category in self.categories:
            if not any(matrix.category == category for matrix in found):
                raise PlanError(
                    f"hft finds no {category} matrices among {len(shapes)} trainable parameters, such as "
                    f"{next(iter(shapes))}. Leave {category!r} out of categories, or correct the pattern "
                    "that finds it (attention, feed_forward; norms are found by the class of their module)."
                )
        return _merged(found) if self.experts == "whole" else found, routers

    def _category(
        self, key: str, block: tuple[str, int], names: Sequence[str], norms: set[str]
    ) -> Category | None:
        rest = key.removeprefix(f"{block[0]}.{block[1]}.")
        if any(name in norms for name in names):
            return "norm"
        if searched(self.attention, rest, "attention"):
            return "attention"
        return "feed_forward" if searched(self.feed_forward, rest, "feed_forward") else None

    def _drawn(
        self, key: str, block: tuple[str, int], category: Category, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Matrix]:
        size = max(math.prod(shape) for shape in shapes.values())  # of the matrix: without its bias
        pool: str = category
        expert = category == "feed_forward" and "expert" in key
        stacked = max(shapes.values(), key=len)[0] if expert and max(map(len, shapes.values())) > 2 else 0
        if expert and self.experts == "each" and (stacked or _EXPERT.search(key)):
            pool = f"{category} {_EXPERT.sub('', key.removeprefix(f'{block[0]}.{block[1]}.'))}"
        elif self.balance == "scalars" and category != "norm":
            side = "kv" if category == "attention" and _KEY_VALUE.search(key) else ""
            pool = f"{category} {side}{size}"
        whole = Matrix(
            key, block, category, pool, tuple((n, None) for n in shapes), sum(map(math.prod, shapes.values()))
        )
        if not stacked or self.experts == "whole":
            return [whole]
        return [
            dataclasses.replace(
                whole,
                key=f"{key}.{number}",
                parts=tuple((name, (number, number + 1)) for name in shapes),
                scalars=whole.scalars // stacked,
            )
            for number in range(stacked)
        ]


def draw(
    matrices: Sequence[Matrix],
    ratio: float,
    generator: torch.Generator,
    *,
    level: Literal["category", "layer", "model"] = "category",
) -> list[Matrix]:
    """Return the matrices that train, by the rules of the module page.

    Args:
        matrices: To draw from.
        ratio: p, in [0, 1]; taken as the decimal it is written as, so that 0.3 of 10 is 3.
        generator: On the CPU.
        level: See the module page.
    """
    part = Fraction(repr(ratio))
    if level == "model":
        return [matrices[i] for i in _some(len(matrices), _rounded(len(matrices) * part), generator)]
    if level == "layer":
        blocks = list(dict.fromkeys(matrix.block for matrix in matrices))
        trained = {blocks[i] for i in _some(len(blocks), _rounded(len(blocks) * part), generator)}
        return [matrix for matrix in matrices if matrix.block in trained]
    pools: dict[tuple[str, str], dict[tuple[str, int], list[Matrix]]] = {}
    for matrix in matrices:
        members = pools.setdefault((matrix.block[0], matrix.pool), {})
        members.setdefault(matrix.block, []).append(matrix)
    chosen: list[Matrix] = []
    for pool in pools.values():
        for size in sorted({len(block) for block in pool.values()}):
            group = [block for block in pool.values() if len(block) == size]
            least = math.floor(size * part)
            more = set(_some(len(group), _rounded(len(group) * (size * part - least)), generator))
            for place, block in enumerate(group):
                chosen += [block[i] for i in _some(size, least + (place in more), generator)]
    return chosen


def shares(matrices: Iterable[Matrix], chosen: Iterable[Matrix]) -> dict[str, dict[str, float]]:
    """Return per category how many matrices train, and what share of the scalars of all of them that is.

    Returns:
        ``trained``, ``matrices``, ``share``, and ``least`` and ``most`` over the blocks.
    """
    trained = set(chosen)
    sums: dict[str, dict[tuple[str, int], list[int]]] = {}
    counts: dict[str, list[int]] = {}
    for matrix in matrices:
        both = sums.setdefault(matrix.category, {}).setdefault(matrix.block, [0, 0])
        count = counts.setdefault(matrix.category, [0, 0])
        for side in (0, 1) if matrix in trained else (1,):
            both[side] += matrix.scalars
            count[side] += 1
    return {
        category: {
            "trained": counts[category][0],
            "matrices": counts[category][1],
            "share": sum(one for one, _ in blocks.values()) / sum(all_ for _, all_ in blocks.values()),
            "least": min(one / all_ for one, all_ in blocks.values()),
            "most": max(one / all_ for one, all_ in blocks.values()),
        }
        for category, blocks in sums.items()
    }


def selection_of(
    chosen: Iterable[Matrix], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSelection]:
    """Return matrices as what trains of each parameter."""
    rows: dict[str, list[int]] = {}
    selected: dict[str, TensorSelection] = {}
    for matrix in chosen:
        for name, span in matrix.parts:
            if span is None:
                selected[name] = TensorSelection.all(shapes[name])
            else:
                rows.setdefault(name, []).extend(range(*span))
    for name, numbers in rows.items():
        selected[name] = TensorSelection.of("rows", shapes[name], torch.tensor(numbers))
    return selected


def half_reset(model: nn.Module, base: nn.Module | Mapping[str, torch.Tensor], plan: SelectionPlan) -> None:
    """Put what ``plan`` selects back to the base, in place; the rest keeps its training (the paper's pilot).

    Args:
        model: Fine-tuned; plain, with no selection in force.
        base: The model before training, or its ``state_dict``; rounded to the model's type.
        plan: Of :class:`HFT` or any other; made for the base or the tuned model, its hashes are not asked.

    Raises:
        PlanError: The plan or the base is of another model.
    """
    plan.check(model, hashes=False)
    source = base if isinstance(base, Mapping) else base.state_dict()
    names: dict[str, list[str]] = {name: [name] for name in plan.touched}
    for other, name in plan.tied.items():
        names.get(name, []).append(other)
    values: dict[str, torch.Tensor] = {}
    for name, selection in plan.touched.items():
        known = next((other for other in names[name] if other in source), None)
        if known is None or tuple(source[known].shape) != selection.shape:
            found = "has no such tensor" if known is None else f"has it as {list(source[known].shape)}"
            raise PlanError(
                f"{name} of shape {list(selection.shape)} cannot be put back: the base {found}. Give the "
                "base the model was trained from."
            )
        values[name] = source[known]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                old = values[name].to(parameter)
                part = plan.tensors[name]
                parameter.copy_(
                    torch.where(part.mask().to(old.device), old, parameter) if part.partial else old
                )


# ---- names -----------------------------------------------------------------------------------------------


def _block(name: str) -> tuple[str, int] | None:
    """Return what precedes the first number in a name, and the number."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def _unit(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what a parameter is drawn with: its module, so that a bias follows its matrix."""
    module, _, last = name.rpartition(".")
    if _ADAPTER.search(name):
        return _ADAPTER.sub("", name)
    if last in ("weight", "bias"):
        return module
    return name[:-5] if name.endswith("_bias") and name[:-5] in shapes else name


def _merged(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return the matrices with a projection of all experts of a block as one."""
    found: dict[str, Matrix] = {}
    for matrix in matrices:
        key = _EXPERT.sub("", matrix.key)
        one = found.get(key)
        found[key] = dataclasses.replace(
            matrix,
            key=key,
            parts=(*(one.parts if one else ()), *matrix.parts),
            scalars=matrix.scalars + (one.scalars if one else 0),
        )
    return list(found.values())


def _rounded(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def _some(size: int, count: int, generator: torch.Generator) -> list[int]:
    return sorted(torch.randperm(size, generator=generator)[:count].tolist())
