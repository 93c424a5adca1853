"""Does the model run after units are removed? An axis whose removal breaks it is frozen, with the error as the reason.

A graph does not show that a forward pass reads a size from its config, divides one size by another, or rebuilds its
modules. So units of every kind are removed from a copy on the meta device (shapes without values), a different number
in each layer, and the copy is run on the example; `verify` compares values later. Odd numbers of units remain; an axis
of which only multiples of 8 may remain (grouped products need aligned rows) is marked so.
"""

import copy
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from secateur.dims import names
from secateur.errors import SecateurError
from secateur.layout import Axis, Layout
from secateur.torch.base.batches import evaluating
from secateur.torch.base.expected_errors import EXPECTED, in_a_line, line_of
from secateur.torch.base.manifest import changes_of, like, named_tensors
from secateur.torch.shrink.resize import resize
from secateur.torch.trace.derive import trace
from secateur.torch.trace.export import Example

SEQUENCES = (("head", "ffn", "dense", "expert", "rank", "mixer"), ("kv",), ("v",), ("qk",), ("hidden",), ("layer",))
"""Groups of kinds that are removed together, in the order in which they are tried."""
WIDTHS = ("qk", "v")
"""Kinds that share one attribute in many models (`head_dim`), so that they may have to be pruned alike."""
ALIGNMENT = 8
"""The multiple that is tried when an odd number of units breaks the model: 16 bytes of 16-bit numbers.

Four 32-bit numbers make 16 bytes too, but a model that is pruned in float32 may be loaded in bfloat16.
"""
SMALL = 50_000_000
"""Parameters up to which a model that does not run on the meta device is copied and run with its values."""

Keep = dict[str, np.ndarray]
logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Why a smaller copy does not run.

    reason: the error in one line.
    sentence: whether the reason is a sentence of secateur itself.
    """

    reason: str
    sentence: bool


Runs = Callable[[Layout, Keep], Failure | None]
"""(layout, keep) -> what breaks the smaller copy, or None."""


def derive(model: nn.Module, example: Example) -> Layout:
    """The traced layout, in which the axes whose removal breaks the model are frozen.

    Raises ModelError when the model cannot be exported.
    """
    return probe(model, trace(model, example), example)


def probe(model: nn.Module, layout: Layout, example: Example) -> Layout:
    """The layout, in which axes are frozen if their removal breaks the forward pass on `example`, or a reload.

    A model that runs neither on the meta device nor as a copy (or is too large to copy) keeps its traced layout, with a
    warning.
    """
    layout = _freeze(layout, _rebuilt(model, layout))
    runs = _runner(model, example)
    if runs is None:
        return layout
    for kinds in SEQUENCES:
        groups = _groups(layout, kinds)
        error = runs(layout, _merged(groups)) if groups else None
        if error is None or (kinds[0] in WIDTHS and error.sentence and _run_alike(runs, layout)):
            continue
        layout = _freeze(layout, *_culprits(runs, layout, groups))
    return layout


def _run_alike(runs: Runs, layout: Layout) -> bool:
    """Whether the widths inside heads can all be halved together."""
    axes = [axis for kind in WIDTHS for axis in layout.of_kind(kind)]
    halves = {axis.name: np.arange(axis.size // 2) for axis in axes if axis.size > 1}
    return runs(layout, halves) is None


def _freeze(layout: Layout, reasons: Mapping[str, str], multiples: Mapping[str, int] | None = None) -> Layout:
    """The layout with more axes frozen or restricted to multiples.

    reasons: axis -> why it is frozen, together with the axes that are products of it.
    multiples: axis -> the number of which the kept units must be a multiple.
    """
    multiples = multiples or {}
    if not reasons and not multiples:
        return layout

    def frozen(axis: Axis) -> Axis:
        why = next((reasons[n] for n in (axis.name, *axis.parts) if n in reasons), None)
        multiple = multiples.get(axis.name, axis.multiple)
        return dataclasses.replace(axis, frozen=axis.frozen or why, multiple=multiple)

    return dataclasses.replace(layout, axes={name: frozen(axis) for name, axis in layout.axes.items()})


# -- what is removed --------------------------------------------------------------------------------------------------


def _groups(layout: Layout, kinds: Iterable[str]) -> list[Keep]:
    """What to keep: one entry for all axes of a kind that have the same place in their layers."""
    groups: dict[tuple[str, str], Keep] = {}
    for kind in kinds:
        for axis in layout.of_kind(kind):
            params = layout.params.items()
            first = next((param for param, dims in params for dim in dims if axis.name in names(dim)), axis.name)
            param = next((param for param, dims in params if axis.parts and _has_parts(dims, axis)), first)
            keep = groups.setdefault((kind, re.sub(r"\d+", "*", param)), {})
            units = _units(layout, axis, len(keep))
            if units is not None:
                keep[axis.name] = units
    return [keep for keep in groups.values() if keep]


def _has_parts(dims: Any, axis: Axis) -> bool:
    """Whether the dimensions of a parameter have all axes of which `axis` is the product."""
    return set(axis.parts) <= {name for dim in dims for name in names(dim)}


def _units(layout: Layout, axis: Axis, number: int) -> np.ndarray | None:
    """An odd number of units near half, fewer for odd `number`; equally many in each group of query heads."""
    outer = layout.axis(axis.parts[0]).size if axis.parts else 1
    inner = axis.size // outer
    if inner < 2:
        return None
    if axis.kind == "expert":  # a router may choose several experts for a token
        count = max(inner - 1 - number % 2, inner // 2)
    else:
        count = max(1, (inner // 2 - 1) // 2 * 2 + 1 - 2 * (number % 2))
    return np.concatenate([i * inner + np.arange(count) for i in range(outer)])


def _merged(groups: Iterable[Keep]) -> Keep:
    return {name: units for group in groups for name, units in group.items()}


def _aligned(layout: Layout, group: Keep) -> Keep | None:
    """The group with multiples of `ALIGNMENT` kept; None when an axis is too small for that."""
    sizes = {name: (layout.axis(name).size, math.gcd(layout.axis(name).size, ALIGNMENT)) for name in group}
    if any(layout.axis(name).parts or not 1 < multiple < size for name, (size, multiple) in sizes.items()):
        return None
    return {name: np.arange(max(m, len(group[name]) // m * m)) for name, (_, m) in sizes.items()}


def _culprits(runs: Runs, layout: Layout, groups: list[Keep]) -> tuple[dict[str, str], dict[str, int]]:
    """The axes that break the model, in addition to the groups before them that do not break it.

    Returns axis -> why the model does not run, and axis -> the number of which a multiple may remain.
    """
    good: list[Keep] = []
    reasons: dict[str, str] = {}
    multiples: dict[str, int] = {}
    for group in groups:
        error = runs(layout, _merged([*good, group]))
        if error is None:
            good.append(group)
            continue
        rounded = None if error.sentence else _aligned(layout, group)
        if rounded is not None and runs(layout, _merged([*good, rounded])) is None:
            good.append(rounded)
            multiples |= {name: math.gcd(layout.axis(name).size, ALIGNMENT) for name in group}
        else:
            reasons |= dict.fromkeys(group, error.reason)
    return reasons, multiples


# -- how it is run ----------------------------------------------------------------------------------------------------


def _runner(model: nn.Module, example: Example) -> Runs | None:
    """A function that tries out removals on a copy of the model; None when not even a whole copy runs."""
    error: Failure | None = None
    for meta, inputs in ((True, example), (True, _unmasked(example)), (False, example)):
        if not meta and sum(p.numel() for p in model.parameters()) > SMALL:
            break
        error = _error_of(model, inputs, None, {}, meta=meta)
        if error is None:
            return functools.partial(_error_of, model, inputs, meta=meta)
    logger.warning(
        "removal was not tried out on %s, which does not run as a copy (%s); rely on verify",
        type(model).__name__,
        error.reason if error else "",
    )
    return None


def _error_of(model: nn.Module, example: Example, layout: Layout | None, keep: Keep, *, meta: bool) -> Failure | None:
    """What breaks a copy of the model, resized where a layout is passed; None when the copy runs on the example.

    meta: whether the copy is on the meta device.
    """
    try:
        twin = _on_meta(model) if meta else copy.deepcopy(model)
        if layout is not None:
            resize(twin, layout, keep)
        _run(twin, _moved(example, "meta") if meta else example)
    except SecateurError as error:
        return Failure(str(error), sentence=True)
    except Exception as error:  # a forward pass may fail in any way
        reason = in_a_line(error)
        if layout is not None:
            place = f" at {line}" if (line := line_of(error)) else ""
            reason = f"the model does not run when units are removed ({reason}{place}){_advice(reason)}"
        return Failure(reason.replace("#", ""), sentence=False)  # a "#" begins a comment in the text of a layout
    return None


def _advice(reason: str) -> str:
    """What the author of a forward pass can do about a shape that it takes from elsewhere than from the weights."""
    return "; write -1 for the size that units have there" if "is invalid for input of size" in reason else ""


def _unmasked(example: Example) -> Example:
    """The example without its masks: many models ask whether a mask is all ones, and the meta device has no values."""
    if not isinstance(example, Mapping):
        return example
    return {name: value for name, value in example.items() if not name.endswith("mask")}


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy on the meta device; the values are never copied."""
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        memo[id(tensor)] = like(tensor, torch.empty_like(tensor, device="meta"))
    return copy.deepcopy(model, memo)


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    return tuple(_moved(item, device) for item in value) if isinstance(value, tuple | list) else value


def _run(model: nn.Module, example: Example) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model):
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*example)


# -- what a reload would build ----------------------------------------------------------------------------------------


def _rebuilt(model: nn.Module, layout: Layout) -> dict[str, str]:
    """Axes inside modules of another class than the configuration builds; a reloaded model would not have them."""
    if changes_of(model) or not hasattr(getattr(model, "config", None), "to_diff_dict"):
        return {}
    try:
        with torch.device("meta"):
            built = dict(type(model)(copy.deepcopy(model.config)).named_modules())
    except EXPECTED as error:  # a wrapper around a model, or a class whose __init__ takes more than its configuration
        logger.info("%s is not built from its configuration alone (%s)", type(model).__name__, in_a_line(error))
        return {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        twin = built.get(path)
        if twin is None or type(twin) is type(module) or not path:
            continue
        reason = (
            f"{path} has become a {type(module).__name__}, but a reload builds {type(twin).__name__} from the "
            "configuration"
        )
        params = [param for param in layout.params if param.startswith(path + ".")]
        axes = {name for param in params for dim in layout.params[param] for name in names(dim)}
        inside = {name for name in axes if layout.axes[name].kind not in ("hidden", "vocab")}
        reasons |= dict.fromkeys(inside - reasons.keys(), reason)
    return reasons
