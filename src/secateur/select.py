"""Patterns, and the choice under a budget: which weights, blocks or units stay.

Scores are numpy arrays; ranking breaks ties by position, so that a stated count is met to the last weight and the same
scores always give the same plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, namespace
from secateur.budget import OWL, Budget, Entries, Threshold, Uniform, allocate
from secateur.errors import PlanError
from secateur.layout import Axis, Layout, aligned


@dataclass(frozen=True)
class Element:
    """Single weights, anywhere."""

    def __str__(self) -> str:
        return "element"


@dataclass(frozen=True)
class NM:
    """`keep` of every `of` consecutive inputs of a weight row: `NM(2, 4)` keeps two of four."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise PlanError(f"pattern {self.keep}:{self.of} keeps {self.keep} of {self.of}; it needs 0 < keep < of")

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class Block:
    """Blocks of `rows` outputs x `columns` inputs, kept or removed whole."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PlanError(f"block {self.rows}x{self.columns} has no weight; use sizes of at least 1")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True, init=False)
class Unit:
    """Whole units of axes: kinds (`Unit("head", "ffn")`) or names (`Unit("L3.ffn")`)."""

    what: tuple[str, ...]

    def __init__(self, *what: str) -> None:
        if not what:
            raise PlanError('Unit() needs at least one kind or axis, such as Unit("head")')
        object.__setattr__(self, "what", what)

    def __str__(self) -> str:
        return ",".join(self.what)


Pattern: TypeAlias = Element | NM | Block | Unit
InDims: TypeAlias = "int | tuple[int, ...]"


def parse_pattern(text: str) -> Pattern:
    """Read `element`, `2:4` (two of four are kept), `4x1` (block of rows x columns), or kinds such as `head,ffn`."""
    text = text.strip()
    for mark, make in ((":", NM), ("x", Block)):
        parts = text.split(mark)
        if len(parts) == 2 and all(part.isdigit() for part in parts):
            return make(int(parts[0]), int(parts[1]))
    if text in ("element", "unstructured"):
        return Element()
    if not text or any(c in text for c in ":+*/ "):
        raise PlanError(f"pattern {text!r} is not understood; use element, 2:4, 4x1, or kinds such as head,ffn")
    return Unit(*(word for word in text.split(",") if word))


def check_budget(pattern: Pattern, budget: Budget | None) -> None:
    """PlanError when a budget is missing, or is one that the pattern cannot follow; N:M needs none."""
    if isinstance(pattern, NM):
        share = 1 - pattern.keep / pattern.of
        if budget is not None and not (isinstance(budget, Uniform) and abs(budget.sparsity - share) < 1e-9):
            raise PlanError(f"pattern {pattern} is its own budget ({share:g} zeros); leave out {budget}")
    else:
        needed_budget(pattern, budget)


def needed_budget(pattern: Element | Block | Unit, budget: Budget | None) -> Budget:
    """The budget; PlanError when it is missing, or is one that the pattern cannot follow."""
    if budget is None:
        raise PlanError(f"pattern {pattern} needs a sparsity or a threshold")
    if isinstance(pattern, Unit) and isinstance(budget, OWL):
        raise PlanError(
            f"OWL deals a sparsity out by the outliers among single weights, not to units such as {pattern}; "
            "use Uniform, Global or PerKind"
        )
    return budget


# -- units ------------------------------------------------------------------------------------------------------------


def resolve_axes(layout: Layout, unit: Unit) -> list[Axis]:
    """The prunable axes that a Unit pattern names; PlanError says why one cannot be pruned."""
    resolved: list[Axis] = []
    for word in unit.what:
        if word in layout.axes:
            if layout.axes[word].frozen:
                raise PlanError(f"axis {word} cannot be pruned (frozen: {layout.axes[word].frozen})")
            resolved.append(layout.axes[word])
            continue
        axes = [axis for axis in layout.of_kind(word) if axis.size > 1]
        if not axes:
            raise PlanError(_nothing_of(layout, word))
        resolved += axes
    return list(dict.fromkeys(resolved))


def _nothing_of(layout: Layout, kind: str) -> str:
    """Why no axis of a kind can be pruned."""
    axes = layout.of_kind(kind, prunable=False)
    frozen = [axis for axis in axes if axis.frozen]
    if axes and not frozen:
        return f"nothing of kind {kind!r} can be pruned: {axes[0].name} has a single unit, which has to stay"
    if frozen:
        return f"nothing of kind {kind!r} can be pruned: {frozen[0].name} is frozen ({frozen[0].frozen})"
    kinds = ", ".join(layout.kinds()) or "nothing at all"
    return f"the model has no axis or kind {kind!r}; it has {kinds}"


def select_units(
    layout: Layout, scores: Mapping[str, np.ndarray], costs: Mapping[str, float], budget: Budget
) -> dict[str, np.ndarray]:
    """Kept units of each axis, sorted.

    scores: axis -> shape (units,).
    costs: axis -> cost of one unit (parameters, MACs), for budgets that compare axes.
    Query heads of grouped attention are chosen so that every group keeps equally many: the best, the second best,
    ... of all groups form a slot, and slots are what the budget ranks. Where an axis must keep a multiple of some
    number, the budget's share is rounded to the nearest one.
    """
    entries = {}
    for name, values in scores.items():
        axis = layout.axis(name)
        groups = _groups(layout, axis)
        slots = -np.sort(-values.reshape(groups, -1), axis=1)
        if isinstance(budget, Threshold):
            entries[name] = Entries(slots.max(0), axis.kind, costs[name] * groups, floor=1)
        else:
            entries[name] = Entries(slots.sum(0), axis.kind, costs[name] * groups, floor=1)
    kept = {name: aligned(layout.axis(name), count) for name, count in allocate(budget, entries).items()}
    keep = {}
    for name, values in scores.items():
        groups = _groups(layout, layout.axis(name))
        rows = values.reshape(groups, -1)
        keep[name] = np.flatnonzero(np.stack([top(row, kept[name]) for row in rows]).reshape(-1))
    return keep


def _groups(layout: Layout, axis: Axis) -> int:
    """How many groups the units of an axis form that must keep equally many."""
    return layout.axis(axis.parts[0]).size if axis.parts else 1


# -- weights ----------------------------------------------------------------------------------------------------------


def select_weights(
    scores: Mapping[str, np.ndarray],
    in_dims: Mapping[str, InDims],
    pattern: Element | NM | Block,
    budget: Budget | None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Masks, True where a weight stays.

    scores: parameter -> signed contributions in its shape.
    in_dims: parameter -> which of its dimensions are contracted.
    budget: None for an N:M pattern, which is its own budget.
    kinds: parameter -> its kind, for budgets that rank within kinds.

    Raises PlanError for a missing budget, and when sizes are not multiples of the pattern.
    """
    if isinstance(pattern, NM):
        check_budget(pattern, budget)
        return {name: _by_rows(name, s, in_dims[name], pattern) for name, s in scores.items()}
    budget = needed_budget(pattern, budget)
    blocks = {name: _block_scores(name, s, in_dims[name], pattern) for name, s in scores.items()}
    kinds = kinds or {}
    entries = {name: Entries(b.reshape(-1), kinds.get(name, "")) for name, b in blocks.items()}
    kept = allocate(budget, entries)
    masks = {}
    for name, grid in blocks.items():
        shape = scores[name].shape
        alive = top(grid.reshape(-1), kept[name]).reshape(grid.shape)
        if isinstance(pattern, Block):
            alive = np.repeat(np.repeat(alive, pattern.rows, axis=-2), pattern.columns, axis=-1)
        masks[name] = restored(alive, in_dims[name], shape)
    return masks


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """True for the `count` highest of a vector, ties to the lower index."""
    if count >= len(scores):
        return np.ones(len(scores), dtype=bool)
    if count <= 0:
        return np.zeros(len(scores), dtype=bool)
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    alive = scores > last
    alive[np.flatnonzero(scores == last)[: count - int(alive.sum())]] = True
    return alive


def _inner(in_dim: InDims) -> tuple[int, ...]:
    """The contracted dimensions as a tuple."""
    return (in_dim,) if isinstance(in_dim, int) else in_dim


def rows_of(array: Array, in_dim: InDims) -> Array:
    """A weight with its contracted dimensions last, as one dimension: (..., out, in); on any array library."""
    inner = _inner(in_dim)
    moved = namespace(array).moveaxis(array, inner, tuple(range(-len(inner), 0)))
    return moved.reshape(*moved.shape[: -len(inner)], -1) if len(inner) > 1 else moved


def restored(array: np.ndarray, in_dim: InDims, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `rows_of`: rows (..., out, in) as a weight of that shape."""
    inner = _inner(in_dim)
    unfolded = array.reshape(*array.shape[:-1], *(shape[d] for d in inner))
    return np.ascontiguousarray(np.moveaxis(unfolded, range(-len(inner), 0), inner))


def _block_scores(name: str, scores: np.ndarray, in_dim: InDims, pattern: Element | Block) -> np.ndarray:
    """Score of each weight or block, (..., out, in) or (..., out / rows, in / columns)."""
    rows = rows_of(scores, in_dim)
    if isinstance(pattern, Element):
        return np.abs(rows)
    out, inputs = rows.shape[-2:]
    if out % pattern.rows or inputs % pattern.columns:
        raise PlanError(f"{name} is {out} x {inputs}, which blocks of {pattern} do not divide; choose other sizes")
    shape = (*rows.shape[:-2], out // pattern.rows, pattern.rows, inputs // pattern.columns, pattern.columns)
    return np.abs(rows.reshape(shape).sum((-3, -1)))


def _by_rows(name: str, scores: np.ndarray, in_dim: InDims, pattern: NM) -> np.ndarray:
    """The mask of a weight under an N:M pattern."""
    rows = np.abs(rows_of(scores, in_dim))
    if rows.shape[-1] % pattern.of:
        raise PlanError(f"{name} has {rows.shape[-1]} inputs, not a multiple of {pattern.of}; use another pattern")
    return restored(nm_mask(rows, pattern), in_dim, scores.shape)


def nm_mask(scores: Array, pattern: NM) -> Array:
    """True for the `keep` highest of every `of` consecutive scores along the last axis, ties to the lower index.

    On any array library: a score stays when fewer than `keep` of its group beat it.
    """
    xp = namespace(scores)
    groups = xp.reshape(scores, (*scores.shape[:-1], scores.shape[-1] // pattern.of, pattern.of))
    alive = []
    for i in range(pattern.of):
        beaten = xp.zeros(groups.shape[:-1], dtype=xp.int8, device=device(scores))
        for j in range(pattern.of):
            if j != i:
                better = groups[..., j] >= groups[..., i] if j < i else groups[..., j] > groups[..., i]
                beaten = beaten + xp.astype(better, xp.int8)
        alive.append(beaten < pattern.keep)
    return xp.reshape(xp.stack(alive, axis=-1), scores.shape)
