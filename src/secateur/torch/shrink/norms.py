"""Norms over a width that shrinks: RMS norms are made exact by scaling their weight, centred ones cannot be.

With n channels of which k are kept and the others zero, the mean square over k is n / k times that over n: a weight
scaled by sqrt(n / k) and an epsilon of n / k times the old one make up for it exactly. What a norm does is found by
running it, never by its name: scale invariant and blind to a shift of all channels means centred.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.layout import Layout
from secateur.torch.base import manifest
from secateur.torch.base.expected_errors import EXPECTED

WIDE = ("hidden", "embedding")
"""Kinds of axes that norms go over."""
_SCALE = 1e3
_LARGEST_EPSILON = 1e-2


def norms_over(model: nn.Module, layout: Layout, axis: str) -> list[str]:
    """Paths of the modules that normalise over `axis`: their own weight has it alone, and a scale changes nothing."""
    found = []
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        dims = layout.params.get(name)
        if dims == (((axis,),),) and not any(True for _ in module.children()) and _scale_free(module):
            found.append(path)
    return found


def centred_norms(model: nn.Module, layout: Layout, axis: str) -> list[str]:
    """Those of `norms_over` that subtract the mean (LayerNorm)."""
    return [path for path in norms_over(model, layout, axis) if _centred(model.get_submodule(path))]


def shrinking(model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Path of each RMS norm that loses channels -> how many times more there were."""
    found: dict[str, float] = {}
    for axis, units in keep.items():
        size = layout.axis(axis).size
        if layout.axis(axis).kind in WIDE and 0 < len(units) < size:
            paths = norms_over(model, layout, axis)
            found |= {path: size / len(units) for path in paths if not _centred(model.get_submodule(path))}
    return found


def rescale(model: nn.Module, norms: Mapping[str, float]) -> None:
    """Scale the weights of the norms that `shrinking` found; to be called before channels are taken."""
    for path, times in norms.items():
        module = model.get_submodule(path)
        if not module.weight.is_meta:
            with torch.no_grad():
                # Some norms multiply by 1 + weight: with a weight of zero they pass something on.
                offset = 1.0 if _passes_without_weight(module) else 0.0
                module.weight.copy_((module.weight.double() + offset) * math.sqrt(times) - offset)


def epsilons(model: nn.Module, norms: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The new epsilon of each norm that `shrinking` found: path -> attribute (its only small number) -> value."""
    found: dict[str, dict[str, float]] = {}
    for path, times in norms.items():
        values = vars(model.get_submodule(path)).items()
        small = {name: v * times for name, v in values if type(v) is float and 0 < v < _LARGEST_EPSILON}
        if small:
            found[path] = small
    return found


def _probe(module: nn.Module) -> Any:
    """A double-precision copy of the norm with weights of one and no bias, and an input for it."""
    twin = (
        copy.deepcopy(module).to("cpu") if not module.weight.is_meta else copy.deepcopy(module).to_empty(device="cpu")
    )
    twin = twin.float()
    for tensor in manifest.named_tensors(twin).values():
        tensor.data.fill_(0.0)
    assert isinstance(twin.weight, torch.Tensor)
    twin.weight.data.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    return twin, torch.randn(1, 2, twin.weight.shape[0], generator=generator) * _SCALE


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            result = module(x)
    except EXPECTED:  # a module that is no norm may want anything: then it is none
        return None
    return result if isinstance(result, torch.Tensor) and result.shape == x.shape else None


def _scale_free(module: nn.Module) -> bool:
    twin, x = _probe(module)
    once, twice = _run(twin, x), _run(twin, 3 * x)
    return once is not None and twice is not None and torch.allclose(once, twice, rtol=1e-3, atol=1e-4)


def _centred(module: nn.Module) -> bool:
    twin, x = _probe(module)
    once, shifted = _run(twin, x), _run(twin, x + _SCALE)
    return once is not None and shifted is not None and torch.allclose(once, shifted, rtol=1e-2, atol=1e-2)


def _passes_without_weight(module: nn.Module) -> bool:
    twin, x = _probe(module)
    twin.weight.data.fill_(0.0)
    result = _run(twin, x)
    return result is not None and bool(result.abs().max() > 0.1)
