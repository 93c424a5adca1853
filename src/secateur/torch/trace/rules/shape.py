"""Rules for operations that move, group, cut or join positions without changing values."""

from secateur.torch.trace.atoms import (
    Dim,
    Factor,
    add_up,
    expand,
    fresh,
    is_frozen,
    mark,
    narrow,
    number,
    peel,
    regroup,
    unify,
)
from secateur.torch.trace.values import OpCall, Rule, Value, remap, same, words


def view(call: OpCall) -> Value:
    """view, reshape, flatten, unflatten: the same factors grouped anew."""
    x = call.value("self")
    dims = regroup(x.dims, call.shape)
    unmoved = x.rank == len(dims) and all(map(_same_axes, dims, x.dims))
    order = x.order if unmoved else None
    last = bool(dims and x.dims) and _same_axes(dims[-1], x.dims[-1])
    return call.new(
        dims, key=x.key if last else -1, tag=x.tag, weight=x.weight, order=order, looked_up=x.looked_up, over=x.over
    )


def _same_axes(a: Dim, b: Dim) -> bool:
    return [f.atom for f in expand(a)] == [f.atom for f in expand(b)]


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
    return _moved(call, [int(d) % rank for d in call.args["dims"]])


def movedim(call: OpCall) -> Value:
    """Dimensions move to other places; those not named keep their order."""
    rank = call.value("self").rank
    source, target = call.axes("source"), call.axes("destination")
    places: dict[int, int] = dict(zip(target, source, strict=True))
    rest = iter(i for i in range(rank) if i not in source)
    return _moved(call, [places[i] if i in places else next(rest) for i in range(rank)])


def unsqueeze(call: OpCall) -> Value:
    """A dimension of size one is added."""
    x = call.value("self")
    at = call.axis(rank=x.rank + 1)
    return call.new([*x.dims[:at], (), *x.dims[at:]], tag=x.tag, weight=x.weight, looked_up=x.looked_up)


def squeeze(call: OpCall) -> Value:
    """Dimensions of size one are dropped."""
    x = call.value("self")
    named = call.axes() if call.args.get("dim") is not None else range(x.rank)
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
    times = [int(t) for t in call.get("repeats", call.get("dims", []))]
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
        return _frozen(call, "repeated by counts that data decides")
    axis = call.axis()
    dims = list(x.dims)
    dims[axis] = tuple(expand(dims[axis])) + fresh(count, const=True)
    return call.new(dims)


def _frozen(call: OpCall, reason: str) -> Value:
    call.freeze_all(reason)
    return call.new(call.frozen_dims(reason))


def slice_(call: OpCall) -> Value:
    """A range of positions, with or without a step."""
    x = call.value("self")
    axis = call.axis()
    total, kept = _extent(x.dims[axis]), call.shape[axis]
    start, step = int(call.get("start", 0)), int(call.get("step", 1))
    start = min(max(start + total if start < 0 else start, 0), total)
    dims = list(x.dims)
    if step == 1:
        dims[axis] = narrow(dims[axis], start, kept)
        whole = kept == total
        return call.new(dims, key=x.key if whole else -1, tag=x.tag, weight=x.weight, order=x.order)
    dims[axis] = _every(dims[axis], step, start, kept)
    return call.new(dims, tag=x.tag)


def _every(dim: Dim, step: int, start: int, kept: int) -> Dim:
    """Every step-th position: the outer part of (n/step, step)."""
    factors = expand(dim)
    reason = "taken in steps"
    inner = factors[-1].atom if factors else None
    if inner is not None and kept * step == _extent(dim) and start < step:
        if inner.size > step and inner.form == "plain" and inner.size % step == 0:
            peel(inner, inner.size // step)
            factors = expand(tuple(factors))
        if factors[-1].atom.size == step:
            number(factors[-1:], "numbers the parts of interleaved pairs")
            return tuple(factors[:-1])
    mark(factors, reason)
    return fresh(kept, reason)


def _extent(dim: Dim) -> int:
    total = 1
    for f in expand(dim):
        total *= f.atom.size
    return total


def select(call: OpCall) -> Value:
    """One position of a dimension."""
    x = call.value("self")
    axis = call.axis()
    dim, index = x.dims[axis], call.args.get("index")
    if isinstance(index, int):
        factors = expand(dim)
        inner = factors[-1:]
        if len(factors) == 1 and inner[0].atom.form == "plain":
            mark(dim, "single positions are taken from it")
        elif expand(dim):
            left = narrow(dim, index % _extent(dim), 1)
            assert not expand(left) or is_frozen(left)
    else:
        mark(dim, "looked up by index")
    looked = x.looked_up or (not isinstance(index, int) and x.weight is not None)
    order = tuple(o for i, o in enumerate(x.order) if i != axis) if x.order is not None else None
    dims = [d for i, d in enumerate(x.dims) if i != axis]
    return call.new(dims, weight=x.weight, order=order, looked_up=looked)


def split(call: OpCall) -> list[Value]:
    """split, chunk, split_with_sizes, tensor_split: consecutive ranges."""
    x = call.value("self")
    axis = call.axis()
    parts, start = [], 0
    for shape in call.shapes:
        assert shape is not None
        dims = list(x.dims)
        dims[axis] = narrow(x.dims[axis], start, shape[axis])
        start += shape[axis]
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
    values = [v for v in call.args["tensors"] if isinstance(v, Value)]
    values = [v for v in values if v.rank == len(call.shape)]
    axis = call.axis(rank=len(call.shape))
    dims: list[Dim] = []
    for i in range(len(call.shape)):
        if i == axis:
            dims.append(add_up([v.dims[i] for v in values]))
        else:
            dims.append(_together([v.dims[i] for v in values]))
    weight = values[0].weight if len({v.weight for v in values}) == 1 else None
    return call.new(dims, weight=weight)


def _together(dims: list[Dim]) -> Dim:
    whole = True
    for other in dims[1:]:
        whole &= unify(dims[0], other)
    opened = [expand(d) for d in dims]
    if not whole:
        return remap(dims[0], zero=False, const=False)
    return tuple(
        Factor(f.atom, all(o[i].zero for o in opened), all(o[i].const for o in opened)) for i, f in enumerate(opened[0])
    )


def stack(call: OpCall) -> Value:
    """Tensors side by side along a new dimension."""
    values = [v for v in call.args["tensors"] if isinstance(v, Value)]
    axis = call.axis(rank=len(call.shape))
    dims = [_together([v.dims[i] for v in values]) for i in range(len(call.shape) - 1)]
    dims.insert(axis, fresh(len(values), "numbers tensors that were stacked", zero=True))
    return call.new(dims)


def pad(call: OpCall) -> Value:
    """Padding freezes the dimensions it widens."""
    x = call.value("self")
    amounts = list(call.args["pad"])
    dims = list(x.dims)
    filled = call.get("value", 0)
    zero = filled == 0 and call.get("mode", "constant") == "constant"
    if not zero:
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
        if at >= 0 and expand(source.dims[at]):
            dims.append(_overwritten(dim, source.dims[at]))
        else:
            dims.append(remap(dim, zero=False))
    return same(call.new(dims), tag=source.tag)


def _overwritten(dim: Dim, source: Dim) -> Dim:
    return source if unify(dim, source) else remap(source, zero=False, const=False)


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
