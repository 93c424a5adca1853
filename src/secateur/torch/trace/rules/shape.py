"""Rules for operations that move, group, cut or join positions without changing values."""

from secateur.torch.trace.atoms import (
    Dim,
    add_up,
    expand,
    fresh,
    is_frozen,
    mark,
    narrow,
    number,
    peel,
    regroup,
    same_axes,
    size,
    unify,
)
from secateur.torch.trace.values import NotCovered, OpCall, Rule, Value, meet, remap, words


def view(call: OpCall) -> Value:
    """view, reshape, flatten, unflatten: the same factors in other groups."""
    x = call.value("self")
    if 0 in call.shape:
        raise NotCovered("an empty tensor")
    dims = regroup(x.dims, call.shape)
    unmoved = x.rank == len(dims) and all(map(same_axes, dims, x.dims))
    order = x.order if unmoved else None
    last = bool(dims and x.dims) and same_axes(dims[-1], x.dims[-1])
    return call.new(
        dims, key=x.key if last else -1, tag=x.tag, weight=x.weight, order=order, looked_up=x.looked_up, over=x.over
    )


def _moved(call: OpCall, order: list[int]) -> Value:
    x = call.value("self")
    stored = tuple(x.order[i] for i in order) if x.order is not None else None
    return call.new([x.dims[i] for i in order], tag=x.tag, weight=x.weight, order=stored, looked_up=x.looked_up)


def transpose(call: OpCall) -> Value:
    """Two dimensions change places."""
    rank = call.value("self").rank
    first, second = ("axis0", "axis1") if "axis0" in call.args else ("dim0", "dim1")
    i, j = call.axis(first), call.axis(second)
    order = list(range(rank))
    order[i], order[j] = order[j], order[i]
    return _moved(call, order)


def transpose_all(call: OpCall) -> Value:
    """t, numpy_T, mT, adjoint: the last two dimensions change places (all, for numpy_T)."""
    order = list(range(call.value("self").rank))
    if call.name in ("mT", "mH", "adjoint"):
        order[-2:] = order[:-3:-1]
    else:
        order.reverse()
    return _moved(call, order)


def permute(call: OpCall) -> Value:
    """Dimensions change places."""
    rank = call.value("self").rank
    return _moved(call, [d % rank for d in call.integers("dims")])


def movedim(call: OpCall) -> Value:
    """Dimensions move to other places; the dimensions that are not named keep their order."""
    rank = call.value("self").rank
    source, target = call.axes("source"), call.axes("destination")
    moved = dict(zip(target, source, strict=True))
    rest = iter(i for i in range(rank) if i not in source)
    return _moved(call, [moved[i] if i in moved else next(rest) for i in range(rank)])


def unsqueeze(call: OpCall) -> Value:
    """A dimension of size one is added."""
    x = call.value("self")
    at = call.axis(rank=x.rank + 1)
    return call.new([*x.dims[:at], (), *x.dims[at:]], tag=x.tag, weight=x.weight, looked_up=x.looked_up)


def squeeze(call: OpCall) -> Value:
    """Dimensions of size one are dropped."""
    x = call.value("self")
    named = call.axes() if x.rank else []
    dims = [d for i, d in enumerate(x.dims) if i not in named or expand(d)]
    return call.new(dims, tag=x.tag, weight=x.weight, looked_up=x.looked_up)


def grow(call: OpCall) -> Value:
    """expand, expand_as, broadcast_to: the tensor is constant along the new positions."""
    x = call.value("self")
    dims: list[Dim] = []
    for i, extent in enumerate(call.shape):
        at = i - (len(call.shape) - x.rank)
        old = x.dims[at] if at >= 0 else ()
        dims.append(old if expand(old) or extent == 1 else fresh(extent, const=True))
    return call.new(dims, tag=x.tag, weight=x.weight, looked_up=x.looked_up)


def repeat(call: OpCall) -> Value:
    """Tiling: repeats come outside the positions that were there."""
    x = call.value("self")
    times = call.integers("repeats", "dims")
    times = [1] * (len(call.shape) - len(times)) + times
    dims: list[Dim] = []
    for i, count in enumerate(times):
        at = i - (len(call.shape) - x.rank)
        old = x.dims[at] if at >= 0 else ()
        dims.append((fresh(count, const=True) if count > 1 else ()) + tuple(expand(old)))
    return call.new(dims)


def repeat_interleave(call: OpCall) -> Value:
    """Every position several times in a row: repeats come inside."""
    x = call.value("self")
    count = call.args.get("repeats")
    if not isinstance(count, int) or call.args.get("dim") is None:
        return call.frozen("repeated by counts that data decides")
    axis = call.axis()
    dims = list(x.dims)
    dims[axis] = tuple(expand(dims[axis])) + fresh(count, const=True)
    return call.new(dims)


def slice_(call: OpCall) -> Value:
    """A range of positions, with or without a step."""
    x = call.value("self")
    axis = call.axis()
    total, kept = size(x.dims[axis]), call.shape[axis]
    start, step = call.integer("start", 0), call.integer("step", 1)
    start = min(max(start + total if start < 0 else start, 0), total)
    dims = list(x.dims)
    if step == 1:
        dims[axis] = narrow(dims[axis], start, kept)
        return call.new(dims, key=x.key if kept == total else -1, tag=x.tag, weight=x.weight, order=x.order)
    dims[axis] = _every(dims[axis], step, start, kept)
    return call.new(dims, tag=x.tag)


def _every(dim: Dim, step: int, start: int, kept: int) -> Dim:
    """Every step-th position: the outer part of (n / step, step)."""
    factors = expand(dim)
    inner = factors[-1].atom if factors else None
    if inner is not None and kept * step == size(dim) and start < step:
        if inner.size > step and inner.form == "plain" and inner.size % step == 0:
            peel(inner, inner.size // step)
            factors = expand(dim)
        if factors[-1].atom.size == step:
            number(factors[-1:], "numbers the parts of interleaved pairs")
            return tuple(factors[:-1])
    mark(factors, "taken in steps")
    return fresh(kept, "taken in steps")


def select(call: OpCall) -> Value:
    """One position of a dimension."""
    x = call.value("self")
    axis = call.axis()
    index = call.args.get("index")
    if isinstance(index, int):
        _take_position(x.dims[axis], index)
    else:
        mark(x.dims[axis], "looked up by index")
    looked_up = x.looked_up or (not isinstance(index, int) and x.weight is not None)
    order = tuple(o for i, o in enumerate(x.order) if i != axis) if x.order is not None else None
    dims = [d for i, d in enumerate(x.dims) if i != axis]
    return call.new(dims, weight=x.weight, order=order, looked_up=looked_up)


def _take_position(dim: Dim, index: int) -> None:
    """Freeze the axes that one position is taken from. The terms of a sum that do not hold it stay free."""
    factors = expand(dim)
    if len(factors) == 1 and factors[0].atom.form == "plain":
        mark(dim, "single positions are taken from it")
    elif factors:
        left = narrow(dim, index % size(dim), 1)
        if expand(left) and not is_frozen(left):
            raise NotCovered("a single position of several axes")


def split(call: OpCall) -> list[Value]:
    """split, chunk, split_with_sizes, tensor_split: consecutive ranges."""
    x = call.value("self")
    axis = call.axis()
    parts, start = [], 0
    for index in range(len(call.shapes)):
        length = call.shape_of(index)[axis]
        dims = list(x.dims)
        dims[axis] = narrow(x.dims[axis], start, length)
        start += length
        parts.append(call.new(dims, tag=x.tag, weight=x.weight, order=x.order, looked_up=x.looked_up))
    return parts


def unbind(call: OpCall) -> list[Value]:
    """Every position of a dimension by itself."""
    x = call.value("self")
    axis = call.axis()
    mark(x.dims[axis], "single positions are taken from it")
    dims = [d for i, d in enumerate(x.dims) if i != axis]
    return [call.new(dims) for _ in call.shapes]


def cat(call: OpCall) -> Value:
    """Concatenation: a sum along one dimension, the same axes along the others."""
    values = [v for v in call.values("tensors") if v.rank == len(call.shape)]
    if not values:
        raise NotCovered("no tensor of the rank of the result")
    axis = call.axis(rank=len(call.shape))
    dims = [(add_up(column) if i == axis else meet(column, all)) for i, column in enumerate(_columns(values))]
    weight = values[0].weight if len({v.weight for v in values}) == 1 else None
    return call.new(dims, weight=weight)


def _columns(values: list[Value]) -> list[list[Dim]]:
    """For each dimension of tensors of one rank, the dimensions of the tensors there."""
    return [list(column) for column in zip(*(v.dims for v in values), strict=True)]


def stack(call: OpCall) -> Value:
    """Tensors side by side along a new dimension."""
    values = call.values("tensors")
    axis = call.axis(rank=len(call.shape))
    dims = [meet(column, all) for column in _columns(values)]
    dims.insert(axis, fresh(len(values), "numbers tensors that were stacked", zero=True))
    return call.new(dims)


def pad(call: OpCall) -> Value:
    """Padding freezes the dimensions it widens. What is repeated of the tensor itself is zero where the tensor is."""
    x = call.value("self")
    amounts = call.items("padding" if "padding" in call.args else "pad")
    dims = list(x.dims)
    if call.get("value", 0) != 0:
        dims = [remap(d, zero=False) for d in dims]
    for k in range(len(amounts) // 2):
        at = x.rank - 1 - k
        if amounts[2 * k] or amounts[2 * k + 1]:
            mark(dims[at], "padded")
            dims[at] = fresh(call.shape[at], "padded")
    return call.new(dims)


def shuffle(call: OpCall) -> Value:
    """roll, flip: positions change places along the dimensions named."""
    x = call.value("self")
    dims = list(x.dims)
    for axis in call.axes("dims"):
        mark(dims[axis], "its positions are rolled or flipped")
        dims[axis] = fresh(call.shape[axis], "rolled or flipped")
    return call.new(dims)


def triangle(call: OpCall) -> Value:
    """tril, triu: depends on the two last positions."""
    x = call.value("self")
    for dim in x.dims[-2:]:
        mark(dim, "cut to a triangle")
    return call.new(x.dims)


def diagonal(call: OpCall) -> Value:
    """diagonal: freezes the two dimensions read."""
    x = call.value("self")
    i, j = call.axis("dim1", default=0), call.axis("dim2", default=1)
    mark(x.dims[i], "its diagonal is taken")
    mark(x.dims[j], "its diagonal is taken")
    dims = [d for k, d in enumerate(x.dims) if k not in (i, j)]
    return call.new([*dims, fresh(call.shape[-1], "a diagonal")])


def as_real(call: OpCall) -> Value:
    """A complex tensor seen as pairs of real ones."""
    x = call.value("self")
    return call.new([*x.dims, fresh(2, "real and imaginary part", zero=True)])


def as_complex(call: OpCall) -> Value:
    """Pairs of real numbers seen as complex ones."""
    x = call.value("self")
    mark(x.dims[-1], "real and imaginary part")
    return call.new(x.dims[:-1])


def overwrite(call: OpCall) -> Value:
    """copy_: the source takes the place of what was there."""
    x, source = call.value("self"), call.value("src")
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        at = i - (x.rank - source.rank)
        if at < 0 or not expand(source.dims[at]):
            dims.append(remap(dim, zero=False))
        elif unify(dim, source.dims[at]):
            dims.append(source.dims[at])
        else:
            dims.append(remap(source.dims[at], zero=False, const=False))
    return call.new(dims, tag=source.tag)


RULES: dict[str, Rule] = {
    **dict.fromkeys(words("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias"), view),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    **dict.fromkeys(("t", "numpy_T", "mT", "mH", "adjoint"), transpose_all),
    "permute": permute,
    "movedim": movedim,
    "moveaxis": movedim,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), grow),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "slice": slice_,
    "narrow": slice_,
    "select": select,
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"), split),
    "unbind": unbind,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": stack,
    **dict.fromkeys(("pad", "constant_pad_nd", "reflection_pad1d", "replication_pad1d"), pad),
    **dict.fromkeys(("roll", "flip"), shuffle),
    **dict.fromkeys(("tril", "triu"), triangle),
    "diagonal": diagonal,
    "view_as_real": as_real,
    "view_as_complex": as_complex,
    "copy": overwrite,
}
