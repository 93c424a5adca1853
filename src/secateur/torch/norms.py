"""Norms over a width that shrinks: RMS norms are made exact by scaling their weight, centred ones cannot be.

With n channels of which k are kept and the others zero, the root mean square over k is sqrt(n / k) times that over n;
a weight scaled by sqrt(n / k) makes up for it exactly but for epsilon, which counts k / n as much. What a norm does is
found by running it, never by its name: scale invariant and blind to a shift of all channels means centred.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.layout import Layout
from secateur.torch import changes as C

_SCALE = 1e3


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


def rescale(model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]) -> None:
    """Scale the weights of RMS norms over hidden axes that lose channels; to be called before they are taken."""
    for axis, units in keep.items():
        if layout.axis(axis).kind != "hidden" or len(units) == layout.axis(axis).size:
            continue
        factor = math.sqrt(layout.axis(axis).size / len(units))
        for path in norms_over(model, layout, axis):
            module = model.get_submodule(path)
            if not _centred(module) and not module.weight.is_meta:
                with torch.no_grad():
                    # Some norms multiply by 1 + weight: with a weight of zero they pass something on.
                    offset = 1.0 if _passes_without_weight(module) else 0.0
                    module.weight.copy_((module.weight.double() + offset) * factor - offset)


def _probe(module: nn.Module) -> Any:
    """A double-precision copy of the norm with weights of one and no bias, and an input for it."""
    twin = (
        copy.deepcopy(module).to("cpu") if not module.weight.is_meta else copy.deepcopy(module).to_empty(device="cpu")
    )
    twin = twin.float()
    for tensor in C.named_tensors(twin).values():
        tensor.data.fill_(0.0)
    assert isinstance(twin.weight, torch.Tensor)
    twin.weight.data.fill_(1.0)
    generator = torch.Generator().manual_seed(0)
    return twin, torch.randn(1, 2, twin.weight.shape[0], generator=generator) * _SCALE


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    try:
        with torch.no_grad():
            result = module(x)
    except Exception:  # a module that is no norm may want anything
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
