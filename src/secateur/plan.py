"""Plan: the decision as data. Which units of which axes stay, which single weights stay, and where that came from.

A plan is `plan.json`, `plan.safetensors` with one bit a weight when it holds element masks, and
`plan-weights.safetensors` when repair has changed weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from secateur import notebook
from secateur.errors import PlanError, shown
from secateur.files import write_json
from secateur.layout import Layout
from secateur.schemas.plan import PlanFile
from secateur.schemas.reading import check, read_json
from secateur.summary import of_plan

FORMAT = 1
JSON_NAME = "plan.json"
MASKS_NAME = "plan.safetensors"
WEIGHTS_NAME = "plan-weights.safetensors"
_SHOWN = ("criterion", "repair", "pattern", "budget")
"""What a notebook shows of the provenance."""
_REMEDY = "prune again, or copy the plan again"


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    keep: axis -> sorted indices of the kept units.
    masks: parameter -> bool array of its shape, True where the weight stays.
    sizes: size of each axis in `keep` before pruning, so that a plan for another model is refused.
    provenance: criterion, pattern, budget and whatever else explains the decision (JSON values).
    weights: parameter -> its new weights, for masks that were made by repair.
    """

    keep: Mapping[str, np.ndarray] = field(default_factory=dict)
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Plan({of_plan(self.keep, self.masks, self.sizes, len(self.weights))})"

    def _repr_html_(self) -> str:
        notes = [
            ", ".join(f"{key}: {step[key]}" for key in _SHOWN if step.get(key)) for step in _steps(self.provenance)
        ]
        if self.masks:
            notes.append(of_plan({}, self.masks, {}, len(self.weights)))
        rows = [(name, len(units), self.sizes.get(name)) for name, units in self.keep.items()]
        return notebook.table("Plan", ("axis", "kept units", "of"), rows, notes=notes)

    @property
    def structured(self) -> bool:
        """Whether whole units are removed, so that tensors can shrink."""
        return bool(self.keep)

    def check(self, layout: Layout) -> "Plan":
        """Return the plan with its units sorted; PlanError when it does not fit the layout."""
        for name, size in self.sizes.items():
            if layout.axis(name).size != size:
                raise PlanError(f"the plan was made for {name} of size {size}, the model has {layout.axis(name).size}")
        for param, array in (*self.masks.items(), *self.weights.items()):
            if param not in layout.params:
                raise PlanError(f"the plan masks {param}, which the model does not have")
            if array.shape != layout.shape(param):
                raise PlanError(f"the plan masks {param} as {array.shape}, the model has {layout.shape(param)}")
        keep = layout.check_keep(self.keep)
        return Plan(keep, self.masks, {name: layout.axis(name).size for name in keep}, self.provenance, self.weights)

    def mask(self, layout: Layout, param: str) -> np.ndarray | None:
        """What stays of a parameter, units and masks together, as a bool array of its shape; None when all does."""
        mask = self.masks.get(param)
        kept = layout.kept(param, self.keep)
        if kept is None:
            return np.zeros(layout.shape(param), dtype=bool)
        for i, alive in enumerate(kept):
            if alive is not None:
                shape = [1] * len(kept)
                shape[i] = -1
                along = np.broadcast_to(alive.reshape(shape), layout.shape(param))
                mask = along if mask is None else mask & along
        return None if mask is None or mask.all() else np.array(mask)

    def merge(self, other: "Plan") -> "Plan":
        """Both decisions at once: a unit or weight stays when both keep it."""
        keep = dict(self.keep)
        for name, units in other.keep.items():
            keep[name] = np.intersect1d(keep[name], units) if name in keep else units
        masks = dict(self.masks)
        for param, mask in other.masks.items():
            masks[param] = masks[param] & mask if param in masks else mask
        steps = [*_steps(self.provenance), *_steps(other.provenance)]
        provenance = {"steps": steps} if steps else {}
        return Plan(keep, masks, {**self.sizes, **other.sizes}, provenance, {**self.weights, **other.weights})

    def save(self, folder: Path | str) -> None:
        """Write the plan into an existing folder; PlanError when it was never checked against a layout."""
        folder = Path(folder)
        unknown = next((name for name in self.keep if name not in self.sizes), None)
        if unknown is not None:
            raise PlanError(f"the plan does not say how many units {unknown} had; save plan.check(layout) instead")
        if self.masks:
            bits = {name: np.packbits(mask.reshape(-1)) for name, mask in self.masks.items()}
            save_file(bits, folder / MASKS_NAME)
        if self.weights:
            save_file(
                {name: np.ascontiguousarray(array) for name, array in self.weights.items()}, folder / WEIGHTS_NAME
            )
        write_json(
            folder / JSON_NAME,
            {
                "format": FORMAT,
                "provenance": dict(self.provenance),
                "keep": {
                    name: {"of": int(self.sizes[name]), "units": np.asarray(units).tolist()}
                    for name, units in self.keep.items()
                },
                "masks": {name: list(mask.shape) for name, mask in self.masks.items()},
                "weights": sorted(self.weights),
            },
        )

    @staticmethod
    def load(folder: Path | str) -> "Plan":
        """Read a plan; PlanError when there is none or it is damaged."""
        folder = Path(folder)
        path = folder / JSON_NAME
        if not path.is_file():
            raise PlanError(f"{folder} holds no {JSON_NAME}")
        data = read_json(path, error=PlanError, remedy=_REMEDY, infinite=True)
        if data.get("format") != FORMAT:
            raise PlanError(f"{path} has format {shown(data.get('format'))}; this version reads {FORMAT}")
        read = check(data, PlanFile, str(path), error=PlanError, remedy=_REMEDY)
        keep = {name: np.array(entry.units, dtype=np.int64) for name, entry in read.keep.items()}
        sizes = {name: entry.of for name, entry in read.keep.items()}
        for name, units in keep.items():
            if len(np.unique(units)) != len(units) or (units >= sizes[name]).any():
                raise PlanError(f"{path} is damaged: {name} keeps a unit twice, or one beyond {sizes[name]}; {_REMEDY}")
        bits = _arrays(folder / MASKS_NAME) if read.masks else {}
        stored = _arrays(folder / WEIGHTS_NAME) if read.weights else {}
        try:
            masks = {name: _unpack(bits[name], tuple(shape)) for name, shape in read.masks.items()}
            weights = {name: stored[name] for name in read.weights}
        except (KeyError, ValueError) as error:
            raise PlanError(f"the plan in {folder} is damaged: {error}; {_REMEDY}") from None
        wrong = next((name for name in weights if name in masks and weights[name].shape != masks[name].shape), None)
        if wrong is not None:
            raise PlanError(f"the plan in {folder} is damaged: {wrong} has a mask of another shape; {_REMEDY}")
        return Plan(keep, masks, sizes, read.provenance, weights)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file; PlanError when it is damaged, or has a type that numpy lacks."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanError(f"{path} is damaged ({reason}); {_REMEDY}") from None


def resized_masks(layout: Layout, plan: Plan) -> Plan:
    """The element masks of a plan for the model that `resize(plan)` leaves: cut to size, under the new names."""
    masks = {}
    for name, mask in plan.masks.items():
        kept = layout.kept(name, plan.keep)
        if kept is None:
            continue
        for dim, alive in enumerate(kept):
            if alive is not None:
                mask = np.compress(alive, mask, axis=dim)
        masks[_renumbered(layout, plan, name)] = mask
    return Plan(masks=masks, provenance=plan.provenance)


def _renumbered(layout: Layout, plan: Plan, param: str) -> str:
    """The name of a parameter once the layers or experts before its own are gone."""
    changes = []
    for name, units in plan.keep.items():
        path, index = layout.axis(name).path, layout.member_of(param, name)
        if path is not None and index is not None:
            changes.append((path, index, int(np.searchsorted(units, index))))
    for path, old, new in sorted(changes, key=lambda change: -len(change[0])):
        param = f"{path}.{new}{param[len(f'{path}.{old}') :]}"
    return param


def to_be_written(written: Mapping[str, np.ndarray | None], name: str, plan: Plan) -> bool:
    """Whether a host has pruned a parameter and not yet given it the plan's weights. written: see `note_written`."""
    return name in written and name in plan.weights and written[name] is not plan.weights[name]


def note_written(written: dict[str, np.ndarray | None], name: str, plan: Plan) -> None:
    """Note which weights a host has given a parameter that it pruned: an array of a plan, or None for its own."""
    written[name] = plan.weights.get(name, written.get(name))


def _steps(provenance: Mapping[str, Any]) -> list[Any]:
    if not provenance:
        return []
    return list(provenance["steps"]) if "steps" in provenance else [dict(provenance)]


def _unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    if bits.dtype != np.uint8 or bits.size != -(-count // 8):
        raise ValueError(f"{bits.size} bytes cannot be a mask of {shape}")
    return np.unpackbits(bits, count=count).astype(bool).reshape(shape)
