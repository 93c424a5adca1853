"""Whole units of one layer: the order in which they go, what that costs, and the weights that make up for them.

y = W x + b reads the units. With the gradients g of a loss at y, K-FAC takes its curvature apart (Martens and Grosse,
2015): A = sum |g|^2 x x^T / sum |g|^2 of the inputs and G = sum g g^T of the outputs. When the inputs S go and the
others make up for them, the loss grows by tr(G W_S ([A^-1]_SS)^-1 W_S^T) / 2, and what is left of W is
W - W_S ([A^-1]_SS)^-1 [A^-1]_S: (optimal brain surgeon for columns: Kurtic et al., 2023). The cheapest unit goes first.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from secateur.errors import DataError, PlanError

DAMP, DAMP_OUT = 0.01, 1e-4
"""Added to the diagonals of A and G for the order, in units of their mean diagonal."""
BLOCK = 64
"""Units that go before the matrices are downdated."""
TINY = 1e-30
"""The least pivot."""
MOST_DAMPED = 12
"""How often the damping of a matrix is tried."""
ROWS = 512
"""Rows of a matrix that are downdated at once, so that no product as large as the matrix is in memory beside it."""
COPIES = 4
"""Matrices (in, in) in float64 that `kfac_order` has in memory at once, inside the inversion; `refit` has fewer."""


def kfac_order(
    weight: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    owner: np.ndarray,
    *,
    damp: float = DAMP,
    damp_out: float = DAMP_OUT,
) -> tuple[np.ndarray, np.ndarray]:
    """The order in which units go, (units,), and the loss when the first k of it are gone, (units + 1,).

    weight: (out, in). inputs: A, (in, in), centred where a bias makes up for the mean (see `centred`).
    outputs: G, (out, out), per example. owner: the unit of each input, -1 for an input that always stays, (in,).

    Raises DataError when A or G holds NaN or infinity.
    """
    if not (np.isfinite(inputs).all() and np.isfinite(outputs).all()):
        raise DataError("the curvature of a layer holds NaN or infinity; look for huge values in the model or the data")
    matrices = partial(_matrices, np.asarray(weight, np.float64), inputs, outputs, damp, damp_out)
    units = int(owner.max()) + 1
    groups = [np.flatnonzero(owner == unit) for unit in range(units)]
    if all(len(group) == 1 for group in groups):
        columns = np.concatenate(groups)
        order, costs = _singles(matrices, columns)
    else:
        order, costs = _groups(*matrices(), groups)
    return order, np.concatenate([[0.0], np.cumsum(np.maximum(costs, 0.0))])


def _matrices(
    weight: np.ndarray, inputs: np.ndarray, outputs: np.ndarray, damp: float, damp_out: float
) -> tuple[np.ndarray, np.ndarray]:
    """A^-1 and W^T G W, both damped, in float64."""
    inverse = np.linalg.inv(positive(inputs, damp))
    return inverse, weight.T @ damped(outputs, damp_out) @ weight


def fisher_order(gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order by squared gradients of gates, and the loss when the first k units are gone and nothing makes up.

    gates: mean square of the gradient of each unit's gate, (units,); the loss is half of their sum (Kwon et al., 2022).
    """
    gates = np.asarray(gates, np.float64)
    if not np.isfinite(gates).all():
        raise DataError("the gradients of gates hold NaN or infinity; look for huge values in the model or the data")
    order = np.argsort(gates, kind="stable")
    return order, np.concatenate([[0.0], np.cumsum(gates[order]) / 2])


def centred(inputs: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A - m m^T: what is left of the inputs (in, in) when a bias makes up for their mean (in,)."""
    mean, found = np.asarray(mean, np.float64), np.array(inputs, np.float64)
    found -= np.outer(mean, mean)
    return found


def damped(matrix: np.ndarray, factor: float) -> np.ndarray:
    """The matrix plus `factor` of its mean absolute diagonal on the diagonal; plus the unit matrix where it is zero. A
    new matrix in float64.
    """
    found = np.array(matrix, np.float64)
    scale = float(np.abs(np.diag(found)).mean())
    found[np.diag_indices_from(found)] += factor * scale if scale > 0 else 1.0
    return found


def positive(matrix: np.ndarray, factor: float, part: np.ndarray | None = None) -> np.ndarray:
    """The damped matrix, with ten times the damping for as long as rounding leaves it without a Cholesky factor.

    A mean that is large beside the spread around it cancels in float32 sums, so that a centred matrix can have negative
    eigenvalues. part: the rows and columns, (n,) of bool, that need a factor; all of them when left out.
    """
    for _ in range(MOST_DAMPED):
        found = damped(matrix, factor)
        try:
            np.linalg.cholesky(found if part is None else found[np.ix_(part, part)])
        except np.linalg.LinAlgError:
            factor *= 10
        else:
            return found
    raise DataError("the inputs of a layer do not vary on this data; pass more calibration rows, or other ones")


def refit(
    weight: np.ndarray,
    inputs: np.ndarray,
    kept: np.ndarray,
    ridge: float,
    mean: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight (out, in) that reads only the kept inputs and is nearest to W x; zero elsewhere. And its bias (out,).

    W_K += W_S A_SK (A_KK)^-1 with A + ridge mean(diag A) I, where the inputs S go. inputs: A, (in, in). kept: (in,) of
    bool.
    mean, bias: where the layer has a bias, A is centred at the mean m (in,), and b' = b + W m - W_K m_K.

    Raises PlanError for a ridge that is no positive number.
    """
    if not 0 < ridge < float("inf"):
        raise PlanError(f"the ridge must be a positive number, not {ridge}")
    weight = np.asarray(weight, np.float64)
    if mean is not None and bias is not None:
        inputs = centred(inputs, mean)
    matrix, gone = positive(inputs, ridge, kept), ~kept
    new = np.zeros_like(weight)
    across = matrix[np.ix_(kept, gone)] @ weight[:, gone].T
    new[:, kept] = weight[:, kept] + np.linalg.solve(matrix[np.ix_(kept, kept)], across).T
    if mean is None or bias is None:
        return new, None
    return new, np.asarray(bias, np.float64) + (weight - new) @ np.asarray(mean, np.float64)


def _singles(
    matrices: Callable[[], tuple[np.ndarray, np.ndarray]], columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order and marginal costs of units of one input each. columns: the input of each unit.

    matrices: make A^-1 and W^T G W, which are made here so that they are freed once they are downdated.

    With H = A^-1 and S = W^T G W, the cost of an input is S_jj / (2 H_jj). When j goes, with a = H_j and p = H_jj,
    H -= a a^T / p and S -= q a^T + a q^T with q = S_j / p - S_jj a / (2 p^2). Only diagonals and the rows of what goes
    are kept up to date; the matrices follow once a block.
    """
    inverse, curvature = matrices()
    unit_of = np.full(len(inverse), -1)
    unit_of[columns] = np.arange(len(columns))
    order, costs = [], []
    while (unit_of >= 0).any():
        count = min(BLOCK, int((unit_of >= 0).sum()))
        left = np.where(unit_of >= 0, 0.0, np.inf)
        u, q, a = (np.zeros((len(inverse), count)) for _ in range(3))
        of_inverse, of_curvature = inverse.diagonal().copy(), curvature.diagonal().copy()
        for k in range(count):
            cost = of_curvature / (2 * of_inverse) + left
            j = int(cost.argmin())
            row = inverse[j] - u[:, :k] @ u[j, :k]
            seen = curvature[j] - q[:, :k] @ a[j, :k] - a[:, :k] @ q[j, :k]
            pivot = max(row[j], TINY)
            u[:, k], a[:, k] = row / np.sqrt(pivot), row
            q[:, k] = seen / pivot - seen[j] * row / (2 * pivot**2)
            order.append(int(unit_of[j]))
            costs.append(float(cost[j]))
            left[j] = np.inf
            of_curvature -= 2 * q[:, k] * row
            of_inverse = np.maximum(of_inverse - u[:, k] ** 2, TINY)  # rounding may go below zero
            of_inverse[j] = 1.0  # it is gone; its diagonal is zero now
            unit_of[j] = -2
        stay = unit_of != -2
        u, q, a = u[stay], q[stay], a[stay]
        inverse = _downdated(inverse, stay, (u, u))
        curvature = _downdated(curvature, stay, (q, a), (a, q))
        unit_of = unit_of[stay]
    return np.array(order), np.array(costs)


def _downdated(matrix: np.ndarray, stay: np.ndarray, *factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The rows and columns that stay, less the product l r^T of each pair of factors (those that stay, k)."""
    found = matrix[np.ix_(stay, stay)]
    for left, right in factors:
        for start in range(0, len(found), ROWS):
            found[start : start + ROWS] -= left[start : start + ROWS] @ right.T
    return found


def _groups(inverse: np.ndarray, curvature: np.ndarray, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Order and marginal costs of units of several inputs. groups: the inputs of each unit.

    The cost of S is tr(([A^-1]_SS)^-1 (W^T G W)_SS) / 2. With B = ([A^-1]_SS)^-1 [A^-1]_S:, W -= W_S B.
    """
    inverse, curvature = inverse.copy(), curvature.copy()
    left, order, costs = list(range(len(groups))), [], []
    while left:
        cost = {
            unit: float((np.linalg.inv(inverse[np.ix_(g, g)]) * curvature[np.ix_(g, g)]).sum() / 2)
            for unit, g in ((unit, groups[unit]) for unit in left)
        }
        unit = min(left, key=lambda unit: cost[unit])
        left.remove(unit)
        order.append(unit)
        costs.append(cost[unit])
        gone = groups[unit]
        back = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
        across = curvature[:, gone] @ back
        curvature += back.T @ curvature[np.ix_(gone, gone)] @ back - across - across.T
        inverse -= inverse[:, gone] @ back
    return np.array(order), np.array(costs)
