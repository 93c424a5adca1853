"""The parts of a record that say what is left of a model: its size, the units of each axis, and its matrices."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from secateur.cost import layer_of_axes, macs, parameters
from secateur.layout import Axis, Layout
from secateur.plan import MASKS_NAME, WEIGHTS_NAME, Plan
from secateur.pruning import default_weights
from secateur.schemas.record import Matrix, Sizes, Units

_BLOCK = re.compile(r"(?:^|\.)L(\d+)\.")


def sizes_of(layout: Layout, plan: Plan, *, bytes: int | None = None, dense_bytes: int | None = None) -> Sizes:
    """The size of the model that a plan leaves. layout: of the dense model. bytes: of its weight files."""
    count, whole = parameters(layout, plan), macs(layout)
    return Sizes(
        parameters=count.total,
        dense_parameters=parameters(layout).total,
        nonzero=count.nonzero,
        bytes=bytes,
        dense_bytes=dense_bytes,
        macs_share=macs(layout, plan) / whole if whole else None,
    )


def model_type_of(model: object) -> str | None:
    """The family that the config of a model names, such as `bert`; None for a model without one."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) and found else None


def weight_bytes(source: Path | str | None) -> int | None:
    """Bytes of the weight files of a model folder; None for what is no folder with safetensors files."""
    folder = Path(source or "")
    if not source or not folder.is_dir():
        return None
    files = [file for file in folder.glob("*.safetensors") if file.name not in (MASKS_NAME, WEIGHTS_NAME)]
    return sum(file.stat().st_size for file in files) or None


def units_of(layout: Layout, plan: Plan) -> list[Units]:
    """How many units of each prunable axis a plan leaves; none for a plan that removes no units.

    layout: of the dense model, whose blocks are counted. Axes of a block that is gone keep none.
    """
    if not plan.keep:
        return []
    lists = {name: set(np.asarray(kept).tolist()) for name, kept in plan.keep.items() if layout.axis(name).path}
    sizes = layout.resized({name: kept for name, kept in plan.keep.items() if name not in lists}).sizes
    layers = layer_of_axes(layout)
    found = []
    for axis in layout.axes.values():
        if axis.frozen:
            continue
        outer, layer = layers.get(axis.name, ("", -1))
        kept = len(lists[axis.name]) if axis.name in lists else sizes[axis.name]
        if outer in lists and layer not in lists[outer]:
            kept = 0
        block = _block(axis, layers)
        found.append(Units(axis=axis.name, kind=axis.kind, block=block, kept=min(kept, axis.size), total=axis.size))
    return found


def matrices_of(layout: Layout, plan: Plan) -> list[Matrix]:
    """The prunable weights of the model that a plan leaves, by their names in the dense model; those of layers that are
    gone are left out. layout: of the dense model.
    """
    blocks = blocks_of(layout, default_weights(layout))
    found = []
    for name, block in blocks.items():
        shape = layout.kept_shape(name, plan.keep)
        if shape is None:
            continue
        mask = plan.mask(layout, name) if name in plan.masks else None
        size = math.prod(shape)
        density = 1.0 if mask is None else int(mask.sum()) / size if size else 0.0
        whole = layout.shape(name)
        found.append(Matrix(name=name, block=block, shape=list(shape), dense_shape=list(whole), density=density))
    return found


def matrices_with_zeros(layout: Layout, layers: Iterable[tuple[str, int | None, int, int]]) -> list[Matrix]:
    """Matrices whose sizes stay, from (name, block, weights, zeros) of each. layout: of the model."""
    return [
        Matrix(
            name=name,
            block=block,
            shape=list(layout.shape(name)),
            dense_shape=list(layout.shape(name)),
            density=1 - zeros / weights,
        )
        for name, block, weights, zeros in layers
    ]


def blocks_of(layout: Layout, names: Iterable[str]) -> dict[str, int | None]:
    """Parameter -> the number of the block that holds it, from 0; None for one outside of blocks."""
    outer = [axis.name for axis in layout.of_kind("layer", prunable=False)]
    found: dict[str, int | None] = {}
    for name in names:
        members = [member for axis in outer if (member := layout.member_of(name, axis)) is not None]
        found[name] = members[0] if members else None
    return found


def _block(axis: Axis, layers: Mapping[str, tuple[str, int]]) -> int | None:
    """The block of an axis: by its parameters, or by its name (`L3.ffn`) where the layout has no axis of layers."""
    if axis.name in layers:
        return layers[axis.name][1]
    named = _BLOCK.search(axis.name)
    return int(named[1]) if named else None
