"""Is masking a unit the same as removing it? The check that a derived layout must pass, for tests and benchmarks."""

import copy

import numpy as np
import torch

from secateur.layout import Layout
from secateur.torch.shrink.resize import resize

EXACT_KINDS = ("head", "kv", "group", "ffn", "qk", "v", "dense", "rank")


def randomize(model, seed=0):
    """Give every parameter (norms and biases too) random values, so that nothing agrees by being zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def choose(layout: Layout, kinds=EXACT_KINDS, fraction=0.5, seed=0, only=None, multiple=1):
    """Units to keep of every prunable axis of the kinds given, another number for each axis.

    multiple: of what the kept FFN units are a multiple, for layouts that were not probed.
    """
    random = np.random.default_rng(seed)
    part_of = {part for a in layout.axes.values() for part in a.parts}
    keep = {}
    for axis in layout.axes.values():
        if axis.frozen or axis.kind not in kinds or axis.name in part_of or axis.size < 2:
            continue
        if only is not None and axis.name != only:
            continue
        if axis.parts:
            outer = layout.axes[axis.parts[0]].size
            inner = axis.size // outer
            count = max(1, round(inner * fraction))
            picks = [i * inner + random.choice(inner, count, replace=False) for i in range(outer)]
            keep[axis.name] = np.sort(np.concatenate(picks))
            continue
        count = min(axis.size - 1, max(1, round(axis.size * fraction) + int(random.integers(-1, 2))))
        of = max(axis.multiple, multiple if axis.kind == "ffn" and axis.size % multiple == 0 else 1)
        if of > 1:
            count = max(of, count // of * of + of * int(random.integers(-1, 2)))
        if count < axis.size:
            keep[axis.name] = np.sort(random.choice(axis.size, count, replace=False))
    return keep


def mask(model, layout: Layout, keep):
    """Zero, in a copy of the model, every element that a removed unit owns."""
    masked = copy.deepcopy(model)
    tensors = dict(masked.named_parameters())
    with torch.no_grad():
        for name in layout.params:
            kept = layout.kept(name, keep)
            if name not in tensors or kept is None:
                continue
            for dim, positions in enumerate(kept):
                if positions is not None:
                    gone = torch.from_numpy(np.flatnonzero(~positions))
                    tensors[name].index_fill_(dim, gone, 0.0)
    return masked


def outputs(model, example):
    """The floating-point tensors that a model returns; models that draw noise draw the same each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**example) if isinstance(example, dict) else model(*example)
    found = []

    def collect(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(result)
    return found


def difference(model, layout: Layout, keep, example):
    """Largest difference between the masked and the shrunk model, relative to the largest output."""
    masked = mask(model, layout, keep)
    shrunk = copy.deepcopy(model)
    resize(shrunk, layout, keep)
    worst = 0.0
    expected, got = outputs(masked, example), outputs(shrunk, example)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        assert torch.isfinite(a).all()
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) if a.numel() else 0.0)
    return worst
