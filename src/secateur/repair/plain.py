"""Pruning by a criterion alone, through the interface of repair: the weights that stay keep their values."""

import inspect
from collections.abc import Callable

from secateur import criteria
from secateur.arrays import Array
from secateur.errors import PlanError
from secateur.repair.gram import Gram
from secateur.repair.loops import choose
from secateur.repair.problem import pose
from secateur.select import NM, Block, Element


def by_criterion(
    criterion: Callable[..., Array],
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    within: str = "row",
) -> Array:
    """Keep the weights (out, in) that a criterion of `weight` and `act_sq` scores highest; see `secateur.repair`.

    within: "matrix" ranks all weights together; "row" gives every output row (or row of blocks) the same number of
    zeros, the first rows one more where round(sparsity * number of weights) is no multiple of the rows.
    """
    problem = pose(weight, gram, pattern, sparsity)
    xp = problem.xp
    needs = [p.name for p in inspect.signature(criterion).parameters.values() if p.default is p.empty]
    quantities = {"weight": problem.weight, "act_sq": xp.astype(problem.gram.squares, problem.weight.dtype)[None, :]}
    unknown = [need for need in needs if need not in quantities]
    if unknown:
        raise PlanError(f"criterion {criterion.__name__} asks for {unknown[0]!r}; a gram gives weight and act_sq")
    scores = xp.abs(criterion(**{need: quantities[need] for need in needs}))
    mask = choose(scores, pattern, problem.zeros, by_row=within == "row")
    return problem.finish(problem.weight, mask)


def magnitude(
    weight: Array, gram: "Array | Gram", pattern: Element | NM | Block, sparsity: float | None = None
) -> Array:
    """|w|, ranked over the matrix; the gram is checked, and not used."""
    return by_criterion(criteria.magnitude, weight, gram, pattern, sparsity, within="matrix")


def wanda(weight: Array, gram: "Array | Gram", pattern: Element | NM | Block, sparsity: float | None = None) -> Array:
    """|w_ij| sqrt(H_jj), ranked within each row (Sun et al., 2024)."""
    return by_criterion(criteria.wanda, weight, gram, pattern, sparsity)


def ria(weight: Array, gram: "Array | Gram", pattern: Element | NM | Block, sparsity: float | None = None) -> Array:
    """Relative importance and activations, ranked over the matrix (Zhang et al., 2024)."""
    return by_criterion(criteria.ria, weight, gram, pattern, sparsity, within="matrix")
