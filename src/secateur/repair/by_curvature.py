"""Single weights of one layer by the curvature of a loss: what their zeros cost, and a repair that looks at it.

With A of the inputs and G of the outputs as in `secateur.repair.structured`, a change D of the weight makes the loss
grow by tr(D^T G D A) / 2. Methods of repair know one matrix, of the inputs. Given A, and rows scaled by the square
roots of G's diagonal, they minimise this growth with the rows taken as independent.
"""

from collections.abc import Callable

import numpy as np
from array_api_compat import device

from secateur.arrays import Array, namespace, to_numpy
from secateur.repair.gram import Gram
from secateur.select import Element

FLOOR = 1e-3
"""Least importance of a row, in units of the mean over rows."""


def growth(change: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """How much the loss grows: tr(D^T G D A) / 2. change: D, (out, in). inputs: A, (in, in). outputs: G, (out, out)."""
    change = np.asarray(change, np.float64)
    return float(((np.asarray(outputs, np.float64) @ change @ np.asarray(inputs, np.float64)) * change).sum() / 2)


def prune_by_curvature(
    weight: Array, inputs: Gram, outputs: np.ndarray, density: float, method: Callable[..., Array]
) -> np.ndarray:
    """The weight (out, in) with `density` of its entries kept, as numpy.

    weight: (out, in), in the array library that the method works in. inputs: A, prepared. outputs: the diagonal of G,
    (out,). method: see `secateur.repair`.
    """
    rows = np.sqrt(outputs + FLOOR * (outputs.mean() or 1.0))[:, None]
    xp = namespace(weight)
    scale = xp.asarray(rows, dtype=weight.dtype, device=device(weight))
    return to_numpy(method(weight * scale, inputs, Element(), 1.0 - density) / scale)
