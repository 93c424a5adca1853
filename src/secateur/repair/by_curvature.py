"""Single weights of one layer by the curvature of a loss: what their zeros cost, and a repair that looks at it.

With A of the inputs and G of the outputs as in `secateur.repair.structured`, a change D of the weight makes the loss
grow by tr(D^T G D A) / 2. Methods of repair know one matrix, of the inputs. Given A, and rows scaled by the square
roots of G's diagonal, they minimise this growth with the rows taken as independent.
"""

from collections.abc import Callable

import numpy as np
import torch

from secateur.arrays import to_numpy
from secateur.repair.gram import Gram
from secateur.select import Element

FLOOR = 1e-3
"""Least importance of a row, in units of the mean over rows."""


def growth(change: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> float:
    """How much the loss grows: tr(D^T G D A) / 2. change: D, (out, in). inputs: A, (in, in). outputs: G, (out, out)."""
    change = np.asarray(change, np.float64)
    return float(((np.asarray(outputs, np.float64) @ change @ np.asarray(inputs, np.float64)) * change).sum() / 2)


def prune_by_curvature(
    weight: np.ndarray, inputs: Gram, outputs: np.ndarray, density: float, method: Callable[..., torch.Tensor]
) -> np.ndarray:
    """The weight with `density` of its entries kept, float32 (out, in).

    weight: (out, in). inputs: A, prepared from a tensor. outputs: the diagonal of G, (out,). method: see
    `secateur.repair`.
    """
    rows = np.sqrt(outputs + FLOOR * (outputs.mean() or 1.0)).astype(np.float32)[:, None]
    scaled = torch.from_numpy(np.ascontiguousarray(weight, np.float32) * rows)
    return to_numpy(method(scaled, inputs, Element(), 1.0 - density)) / rows
