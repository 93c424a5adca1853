"""ALPS: alternating directions on the layer problem, then least squares (Meng et al., 2024).

In the scale where the gram has a unit diagonal, C, with v0 the dense row: B = (C + rho I)^-1 (C v0 - V + rho D),
D = the kept part of B + V / rho, V += rho (B - D), while rho grows and the choice settles. It begins at the SparseGPT
solution D with V = C (v0 - D), the dual that makes a fit on its support stationary, so that rho may start high and a
dozen steps suffice; each step solves with a Cholesky factor, so no eigenvectors are needed.
"""

from secateur.arrays import Array
from secateur.errors import PlanError
from secateur.repair.forms import inner_loop
from secateur.repair.gram import Gram
from secateur.repair.loops import choose
from secateur.repair.problem import Problem, pose
from secateur.repair.start import Start, start_mask
from secateur.select import NM, Block, Element

SETTLED = 5e-4
"""Share of the kept weights below which a changed choice counts as settled."""


def alps(
    weight: Array,
    gram: "Array | Gram",
    pattern: Element | NM | Block,
    sparsity: float | None = None,
    *,
    start: Start = None,
    damp: float | None = None,
    rho: float = 0.3,
    growth: float = 1.12,
    steps: int = 300,
    tolerance: float | None = None,
    fast: bool = True,
) -> Array:
    """Prune and mend a weight (out, in); see `secateur.repair` for arguments and errors.

    start: where it begins (a mask, a pruned weight or a method); SparseGPT when left out.
    rho: the first penalty.
    growth: factor of the penalty from step to step; a lower one takes more steps and finds slightly better choices.
    steps: the most that are taken.
    tolerance: of the least squares fit at the end.
    Counts over the matrix: element and block patterns have round(sparsity * number of weights or blocks) zeros.
    """
    if not (rho > 0 and growth >= 1):
        raise PlanError(f"the penalty begins above 0 and does not shrink, unlike rho {rho} and growth {growth}")
    problem = pose(weight, gram, pattern, sparsity, damp)
    mask, values = start_mask(problem, start, fast=fast)
    values, mask = _choose_by_splitting(problem, values, mask, rho, growth, steps, fast=fast)
    refit = inner_loop("refit", values, fast=fast)
    live = mask & ~problem.gram.dead[None, :]
    values = refit(values, problem.weight * problem.scale, problem.corr, live, tolerance)
    return problem.finish(values / problem.scale, mask)


def _choose_by_splitting(
    problem: Problem, values: Array, mask: Array, rho: float, growth: float, steps: int, *, fast: bool
) -> tuple[Array, Array]:
    """The splitting itself: weights in the scale of a unit diagonal (out, in), and the mask of what they keep."""
    xp, corr = problem.xp, problem.corr
    solve_positive = inner_loop("solve_positive", problem.weight, fast=fast)
    alive = xp.astype(~problem.gram.dead, problem.weight.dtype)[None, :]
    scale = problem.scale * alive
    dense = problem.weight * scale
    kept = values * scale * xp.astype(mask, values.dtype)
    target = dense @ corr
    dual = target - kept @ corr
    total = float(xp.sum(xp.astype(mask, xp.float64)))
    for _ in range(steps):
        free = solve_positive(corr, rho, target - dual + rho * kept)
        pulled = (free + dual / rho) * alive
        before, mask = mask, choose(pulled**2, problem.pattern, problem.zeros)
        kept = pulled * xp.astype(mask, pulled.dtype)
        dual = dual + rho * (free - kept)
        rho *= growth
        if float(xp.sum(xp.astype(mask != before, xp.float64))) <= SETTLED * total:
            break
    return kept, mask
