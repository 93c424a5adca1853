"""Axis and Layout: what every dimension of every parameter means, and how a unit is found, summed and taken.

All dimensions that carry an axis are coupled. Scoring, zeroing and removing a unit all use one answer to the question
which position belongs to which unit (`Layout.owners`), so they cannot disagree. No framework is needed: arrays are
numpy's, or of any library that the array API describes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from secateur import notebook
from secateur.arrays import to_numpy
from secateur.dims import Dim, coordinates, extent, format_dims, is_axis_name, names, parse_dims
from secateur.errors import LayoutError, PlanError, shown
from secateur.summary import of_axes

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Axis:
    """One named axis: units that are kept or removed together wherever they occur.

    kind: `head`, `kv`, `group`, `qk`, `v`, `ffn`, `hidden`, `layer`, `expert`, `vocab`, or another word.
    frozen: why it cannot be pruned, or None.
    parts: the axes, outermost first, of which this one is the product (query heads are `kv x group`). Every kept unit
        of the first part must keep equally many of its units.
    path: the module list whose element i is unit i (layers, lists of experts).
    multiple: the number of kept units must be a multiple of this, as the model runs with no other number (the rows of
        grouped products are aligned).
    """

    name: str
    size: int
    kind: str
    frozen: str | None = None
    parts: tuple[str, ...] = ()
    path: str | None = None
    multiple: int = 1


@dataclass(frozen=True)
class Linear:
    """A weight that multiplies activations: which tensor it reads, and which of its dimensions are contracted.

    reads: an identifier of the tensor; weights that read the same tensor have the same identifier.
    in_dim: index of the contracted dimension in the stored weight (1 for `torch.nn.Linear`, 0 for a Keras kernel).
    outer: contracted dimensions outside `in_dim`: an attention output kernel (head, v, hidden) contracts the first two.
    inputs: names of the model's inputs from which the tensor is computed; a layout read from text lacks them.
    """

    reads: str
    in_dim: int = 1
    outer: tuple[int, ...] = ()
    inputs: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Every contracted dimension, outermost first."""
        return (*self.outer, self.in_dim)


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass, for counting: `calls` x the extents of `dims` multiply-accumulates.

    weight: the parameter that is multiplied, or None for a product of activations.
    calls: the product of what no axis describes (batch, positions) on the example input.
    """

    weight: str | None
    calls: int
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Layout:
    """The axes of a model and the dimensions of each parameter (and of each buffer that carries an axis).

    axes: name -> axis.
    params: parameter or buffer -> its dimensions.
    linears: the parameters that multiply activations.
    products: the matrix products of the forward pass.
    tied: second name of a shared parameter -> its name in `params`.
    buffers: which of `params` are buffers, which nobody trains or counts; a layout read from text lacks them.
    """

    axes: Mapping[str, Axis]
    params: Mapping[str, tuple[Dim, ...]]
    linears: Mapping[str, Linear] = field(default_factory=dict)
    products: tuple[Product, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = field(default=frozenset(), compare=False)

    def _repr_html_(self) -> str:
        rows = [(a.name, a.kind, " x ".join(a.parts), a.frozen or "", a.size) for a in self.axes.values()]
        title = f"Layout: {len(self.axes)} axes, {len(self.params)} parameters"
        return notebook.table(title, ("axis", "kind", "product of", "why it is frozen", "units"), rows, left=4)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of each axis."""
        return {axis.name: axis.size for axis in self.axes.values()}

    def shape(self, param: str) -> tuple[int, ...]:
        """Shape of a parameter by the sizes of the axes."""
        return tuple(extent(dim, self.sizes) for dim in self.params[param])

    def axis(self, name: str) -> Axis:
        """The axis of that name; LayoutError lists the names where there is none."""
        if name not in self.axes:
            raise LayoutError(f"no axis {shown(name)}; the layout has {', '.join(sorted(self.axes))}")
        return self.axes[name]

    def of_kind(self, kind: str, *, prunable: bool = True) -> list[Axis]:
        """Axes of a kind, in order; only those that can be pruned, or all of them."""
        return [a for a in self.axes.values() if a.kind == kind and not (prunable and a.frozen)]

    def kinds(self) -> list[str]:
        """The kinds that have at least one prunable axis, in order of first appearance."""
        return list(dict.fromkeys(a.kind for a in self.axes.values() if not a.frozen))

    def readers(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Linear weight -> the first of `names` (default: all linear weights) that reads the same tensor.

        A weight that is shared under a second name reads several tensors, so it is mapped to itself.
        """
        shared = set(self.tied.values())
        first: dict[str, str] = {}
        return {
            name: name if name in shared else first.setdefault(self.linears[name].reads, name)
            for name in (self.linears if names is None else names)
        }

    def reads(self, param: str, axis: str) -> bool:
        """Whether a linear weight reads activations that carry the axis."""
        owners = self.owners(param, axis)
        return any(owners[dim] is not None for dim in self.linears[param].contracted)

    # -- which position belongs to which unit ---------------------------------------------------------------------

    def owners(self, param: str, axis: str) -> list[np.ndarray | None]:
        """For each dimension of `param`: the unit of `axis` that owns each position (-1: none); None where none does.

        A parameter inside the module list of a layer or expert axis belongs whole to one unit: see `member_of`.
        """
        parts = self.axis(axis).parts or (axis,)
        result: list[np.ndarray | None] = []
        for dim in self.params[param]:
            if not set(parts) <= set(names(dim)):
                result.append(None)
                continue
            owner: np.ndarray = np.zeros(extent(dim, self.sizes), dtype=np.int64)
            outside = np.zeros(owner.shape, dtype=bool)
            for part in parts:
                coordinate = coordinates(dim, part, self.sizes)
                outside |= coordinate < 0
                owner = owner * self.sizes[part] + coordinate
            owner[outside] = -1
            result.append(owner)
        return result

    def member_of(self, param: str, axis: str) -> int | None:
        """The unit whose module holds the whole parameter, for an axis with a `path`; None otherwise."""
        path = self.axis(axis).path
        if path is None or not param.startswith(path + "."):
            return None
        index = param[len(path) + 1 :].split(".", 1)[0]
        return int(index) if index.isdigit() else None

    def carries(self, param: str, axis: str) -> bool:
        """Whether some dimension of the parameter has positions that belong to units of the axis."""
        parts = set(self.axis(axis).parts or (axis,))
        return any(parts <= set(names(dim)) for dim in self.params[param])

    def members(self, axis: str) -> Iterator[str]:
        """Parameters that carry the axis, or lie whole inside one of its modules, in order."""
        for param in self.params:
            if self.member_of(param, axis) is not None or self.carries(param, axis):
                yield param

    # -- reduce, zero, take ---------------------------------------------------------------------------------------

    def reduce(self, param: str, array: Any, axis: str) -> np.ndarray:
        """Sum an array of the parameter's shape over each unit of `axis`: float64 of shape (axis size,).

        An element that belongs to a unit through two dimensions counts once.
        """
        size = self.axis(axis).size
        unit = self.member_of(param, axis)
        if unit is not None:
            return np.bincount([unit], weights=[float(array.sum())], minlength=size)
        owners = {dim: owner for dim, owner in enumerate(self.owners(param, axis)) if owner is not None}
        total = np.zeros(size)
        for dim, owner in owners.items():
            rest = tuple(d for d in range(len(array.shape)) if d != dim)
            vector = to_numpy(array.sum(rest) if rest else array).astype(np.float64)
            total += sum_by_owner(owner, vector, size)
        if len(owners) == 2:
            a, b = owners.values()
            rest = tuple(d for d in range(len(array.shape)) if d not in owners)
            twice = to_numpy(array).astype(np.float64).sum(rest) * ((a[:, None] == b[None, :]) & (a[:, None] >= 0))
            total -= sum_by_owner(a, twice.sum(1), size)
        return total

    def kept(self, param: str, keep: Keep) -> list[np.ndarray | None] | None:
        """Which positions of each dimension remain: one bool array for each dimension, None where all remain.

        Returns None when the whole parameter is removed, with the layer or expert that it belongs to.
        """
        result: list[np.ndarray | None] = [None] * len(self.params[param])
        for axis, units in keep.items():
            whole = self.member_of(param, axis)
            if whole is not None:
                if whole not in units:
                    return None
                continue
            alive = np.zeros(self.axis(axis).size + 1, dtype=bool)
            alive[np.asarray(units, dtype=np.int64)] = True
            alive[-1] = True  # positions that no unit owns carry the owner -1
            for i, owner in enumerate(self.owners(param, axis)):
                if owner is not None:
                    previous = result[i]
                    result[i] = alive[owner] if previous is None else previous & alive[owner]
        return result

    def kept_shape(self, param: str, keep: Keep) -> tuple[int, ...] | None:
        """Shape of a parameter after removal; None when the whole parameter is removed."""
        kept = self.kept(param, keep)
        if kept is None:
            return None
        return tuple(int(k.sum()) if k is not None else n for k, n in zip(kept, self.shape(param), strict=True))

    def resized(self, keep: Keep) -> "Layout":
        """The layout of the model after removal of all but the kept units.

        Raises LayoutError for layers and experts that are elements of a module list: their removal renames
        parameters, so such a model is described anew.
        """
        axes = dict(self.axes)
        for name, units in keep.items():
            axis = self.axis(name)
            if axis.path:
                raise LayoutError(
                    f"removing elements of {axis.path} renames parameters; write a layout for the new model"
                )
            axes[name] = replace(axis, size=len(units))
        for name, units in keep.items():
            outer, *inner = self.axis(name).parts or ("",)
            if inner:
                kept_outer = len(keep[outer]) if outer in keep else self.axis(outer).size
                alive = [
                    u
                    for u in units
                    if outer not in keep or u // (self.axis(name).size // self.axis(outer).size) in keep[outer]
                ]
                axes[inner[0]] = replace(axes[inner[0]], size=len(alive) // kept_outer)
        for name, axis in axes.items():
            if axis.parts:
                size = math.prod([axes[part].size for part in axis.parts])
                axes[name] = replace(axis, size=size)
        return replace(self, axes=axes)

    # -- checks ---------------------------------------------------------------------------------------------------

    def check(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Raise LayoutError when axes are undeclared, or when parameters have other shapes than the layout says."""
        for axis in self.axes.values():
            if not is_axis_name(axis.name):
                raise LayoutError(f"{shown(axis.name)} is no name of an axis; leave out spaces, parentheses and +")
            product = math.prod([self.axis(part).size for part in axis.parts])
            if axis.parts and product != axis.size:
                raise LayoutError(f"axis {axis.name} has size {axis.size} but its parts give {product}")
        for param, dims in self.params.items():
            for dim in dims:
                for name in names(dim):
                    self.axis(name)
            if shapes is not None and param in shapes and self.shape(param) != tuple(shapes[param]):
                raise LayoutError(
                    f"{param} has shape {tuple(shapes[param])} but the layout says "
                    f"{self.shape(param)} ({format_dims(dims)})"
                )

    def check_keep(self, keep: Keep) -> dict[str, np.ndarray]:
        """Return the kept units sorted, or raise PlanError: frozen axis, unit out of range, nothing left, a number
        that differs between groups or is no multiple of what the axis wants.
        """
        checked: dict[str, np.ndarray] = {}
        for name, units in keep.items():
            axis = self.axis(name)
            array = np.unique(np.asarray(units, dtype=np.int64))
            if axis.frozen:
                raise PlanError(f"axis {name} cannot be pruned (frozen: {axis.frozen})")
            if len(array) != len(units):
                raise PlanError(f"axis {name}: a unit is listed twice among the kept ones")
            if len(array) == 0 and axis.kind != "layer":
                raise PlanError(
                    f"axis {name}: no unit would remain of {axis.size}; keep at least one, or remove the layer"
                )
            if len(array) and (array[0] < 0 or array[-1] >= axis.size):
                raise PlanError(f"axis {name}: unit {array[-1]} is outside 0..{axis.size - 1}")
            if len(array) % axis.multiple:
                raise PlanError(
                    f"axis {name}: {len(array)} of {axis.size} units would remain, but the model runs only with a "
                    f"multiple of {axis.multiple}; keep {aligned(axis, len(array))}"
                )
            checked[name] = array
        for name, array in checked.items():
            parts = self.axis(name).parts
            if parts:
                outer = self.axis(parts[0]).size
                counts = np.bincount(array // (self.axis(name).size // outer), minlength=outer)
                counts = counts[checked[parts[0]]] if parts[0] in checked else counts
                if len(set(counts.tolist())) > 1:
                    raise PlanError(
                        f"axis {name}: {counts.tolist()} units kept per unit of {parts[0]}; "
                        "grouped attention needs the same number in every group"
                    )
        return checked

    # -- text -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Layout({of_axes(self.axes.values())}; {len(self.params)} parameters)"

    def __str__(self) -> str:
        lines = ["axes"]
        width = max((len(a.name) for a in self.axes.values()), default=0)
        for a in self.axes.values():
            extra = f" multiple {a.multiple}" if a.multiple > 1 else ""
            extra += f" = {' '.join(a.parts)}" if a.parts else ""
            extra += f" @ {a.path}" if a.path else ""
            extra += f" frozen: {a.frozen}" if a.frozen else ""
            lines.append(f"  {a.name:<{width}} {a.size:>7} {a.kind}{extra}")
        lines.append("parameters")
        width = max((len(p) for p in self.params), default=0)
        for param, dims in self.params.items():
            linear = self.linears.get(param)
            suffix = f" < {linear.reads} {','.join(map(str, linear.contracted))}" if linear else ""
            lines.append(f"  {param:<{width}} : {format_dims(dims)}{suffix}".rstrip())
        if self.tied:
            lines.append("tied")
            lines += [f"  {alias} = {name}" for alias, name in self.tied.items()]
        if self.products:
            lines.append("products")
            lines += [f"  {p.calls} {p.weight or '-'} : {format_dims(p.dims)}" for p in self.products]
        return "\n".join(lines)

    @staticmethod
    def from_text(text: str) -> "Layout":
        """Read what `str(layout)` writes; LayoutError names the line that cannot be read."""
        return _read_text(text)


def aligned(axis: Axis, count: int) -> int:
    """The number of units nearest to `count` that the axis can keep, at least one multiple; ties to the larger."""
    return min(axis.size, max(1, (count + axis.multiple // 2) // axis.multiple) * axis.multiple)


def sum_by_owner(owner: np.ndarray, vector: np.ndarray, size: int) -> np.ndarray:
    """Sum of a vector over the positions of each unit, float64 of shape (size,). owner: see `Layout.owners`."""
    return np.bincount(owner + 1, weights=vector, minlength=size + 1)[1:]


def _read_text(text: str) -> Layout:
    axes: dict[str, Axis] = {}
    params: dict[str, tuple[Dim, ...]] = {}
    linears: dict[str, Linear] = {}
    tied: dict[str, str] = {}
    products: list[Product] = []
    section = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        if line in ("axes", "parameters", "tied", "products"):
            section = line
            continue
        try:
            if section == "axes":
                axis = _read_axis(line)
                axes[axis.name] = axis
            elif section == "parameters":
                name, _, rest = line.partition(" :")
                rest, _, reads = rest.partition(" < ")
                params[name.strip()] = parse_dims(rest.strip())
                if reads:
                    source, in_dims = reads.split()
                    *outer, in_dim = map(int, in_dims.split(","))
                    linears[name.strip()] = Linear(source, in_dim, tuple(outer))
            elif section == "tied":
                alias, _, name = line.partition(" = ")
                tied[alias.strip()] = name.strip()
            elif section == "products":
                head, _, rest = line.partition(" : ")
                calls, weight = head.split()
                products.append(Product(None if weight == "-" else weight, int(calls), parse_dims(rest)))
            else:
                raise LayoutError("a layout starts with the line 'axes'")
        except (ValueError, IndexError) as error:
            raise LayoutError(f"line {number} of the layout cannot be read ({shown(line)}): {error}") from None
    layout = Layout(axes, params, linears, tuple(products), tied)
    layout.check()
    return layout


def _read_axis(line: str) -> Axis:
    line, _, frozen = line.partition(" frozen: ")
    line, _, path = line.partition(" @ ")
    line, _, parts = line.partition(" = ")
    line, _, multiple = line.partition(" multiple ")
    name, size, kind = line.split()
    return Axis(
        name, int(size), kind, frozen.strip() or None, tuple(parts.split()), path.strip() or None, int(multiple or 1)
    )
