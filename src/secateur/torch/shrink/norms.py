"""Norms over a width that shrinks: scaling the weight makes RMS norms exact; centred norms cannot be made exact.

With n channels of which k are kept and the others are zero, the mean square over the k kept channels is n / k times the
mean square over all n: a weight scaled by sqrt(n / k) and an epsilon scaled by n / k compensate for that exactly. Each
norm is run to find out what it does, whatever its name: a norm whose output depends neither on the scale of its input
nor on a shift of all channels is centred.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.layout import Layout
from secateur.torch.base.expected_errors import EXPECTED
from secateur.torch.base.manifest import named_tensors

WIDE = ("hidden", "embedding")
"""Kinds of axes that norms normalise over."""
_SCALE = 1e3
_LARGEST_EPSILON = 1e-2


def norms_over(model: nn.Module, layout: Layout, axis: str) -> list[str]:
    """Paths of the modules that normalise over `axis`.

    Their own weight has only this axis, and their output does not depend on the scale of the input.
    """
    paths = []
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        dims = layout.params.get(name)
        if dims == (((axis,),),) and not any(True for _ in module.children()) and _scale_free(module):
            paths.append(path)
    return paths


def centred_norms(model: nn.Module, layout: Layout, axis: str) -> list[str]:
    """Those of `norms_over` that subtract the mean (LayerNorm)."""
    return [path for path in norms_over(model, layout, axis) if _centred(model.get_submodule(path))]


def shrinking(model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Path of each RMS norm that loses channels -> number of channels before over number afterwards."""
    ratios: dict[str, float] = {}
    for axis, units in keep.items():
        size = layout.axis(axis).size
        if layout.axis(axis).kind in WIDE and 0 < len(units) < size:
            paths = norms_over(model, layout, axis)
            ratios |= {path: size / len(units) for path in paths if not _centred(model.get_submodule(path))}
    return ratios


def rescale(model: nn.Module, norms: Mapping[str, float]) -> None:
    """Scale the weights of the norms that `shrinking` lists; call it before channels are removed."""
    for path, ratio in norms.items():
        module = model.get_submodule(path)
        if not module.weight.is_meta:
            with torch.no_grad():
                # Some norms multiply by 1 + weight: with a weight of zero their output is not zero.
                offset = 1.0 if _passes_without_weight(module) else 0.0
                module.weight.copy_((module.weight.double() + offset) * math.sqrt(ratio) - offset)


def epsilons(model: nn.Module, norms: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The new epsilon of each norm that `shrinking` lists: path -> attribute (its only small number) -> value."""
    new_values: dict[str, dict[str, float]] = {}
    for path, ratio in norms.items():
        values = vars(model.get_submodule(path)).items()
        small = {name: v * ratio for name, v in values if type(v) is float and 0 < v < _LARGEST_EPSILON}
        if small:
            new_values[path] = small
    return new_values


def _probe(module: nn.Module) -> tuple[Any, torch.Tensor]:
    """A float32 copy of the norm on the CPU, with a weight of ones and no bias, and an input for it."""
    twin = (
        copy.deepcopy(module).to("cpu") if not module.weight.is_meta else copy.deepcopy(module).to_empty(device="cpu")
    )
    twin = twin.float()
    tensors = named_tensors(twin)
    for name, tensor in tensors.items():
        tensor.data.fill_(1.0 if name == "weight" else 0.0)
    generator = torch.Generator().manual_seed(0)
    return twin, torch.randn(1, 2, tensors["weight"].shape[0], generator=generator) * _SCALE


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            result = module(x)
    except EXPECTED:  # a module that is no norm may need other inputs
        return None
    return result if isinstance(result, torch.Tensor) and result.shape == x.shape else None


def _scale_free(module: nn.Module) -> bool:
    twin, x = _probe(module)
    plain, scaled = _run(twin, x), _run(twin, 3 * x)
    return plain is not None and scaled is not None and torch.allclose(plain, scaled, rtol=1e-3, atol=1e-4)


def _centred(module: nn.Module) -> bool:
    twin, x = _probe(module)
    plain, shifted = _run(twin, x), _run(twin, x + _SCALE)
    return plain is not None and shifted is not None and torch.allclose(plain, shifted, rtol=1e-2, atol=1e-2)


def _passes_without_weight(module: nn.Module) -> bool:
    twin, x = _probe(module)
    twin.weight.data.fill_(0.0)
    result = _run(twin, x)
    return result is not None and bool(result.abs().max() > 0.1)
