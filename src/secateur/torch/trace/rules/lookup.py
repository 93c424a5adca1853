"""Rules for operations that read or write positions named by an index tensor, and for constants."""

from secateur.torch.trace.atoms import Dim, expand, fresh, give_role, mark, narrow, same_axes, size, unify
from secateur.torch.trace.values import NotCovered, OpCall, Rule, Value, as_first, broadcast, meet, never, remap


def embedding(call: OpCall) -> Value:
    """Rows of a table, one for each index."""
    weight, indices = call.value("weight"), call.value("indices")
    _looked_up(weight.dims[0], indices)
    give_role(weight.dims[1], "embedded")
    return call.new([*[remap(d, zero=False) for d in indices.dims], *weight.dims[1:]])


def _looked_up(dim: Dim, indices: Value) -> None:
    if indices.data and indices.tag == "input":
        give_role(dim, "token")
    mark(dim, "looked up by index", "token")


def index(call: OpCall) -> Value:
    """x[i, j, :]: the dimensions with an index are looked up, the remaining ones pass."""
    x = call.value("self")
    consumed, tensors = _indexed(call)
    if not consumed:
        raise NotCovered("no dimension is indexed")
    if len(consumed) == 1 and tensors[0].numbers:
        return _at_known_positions(call, x, consumed[0], tensors[0])
    routed = consumed[0] == 0 and x.weight is not None and tensors[0].data and tensors[0].dtype == "int"
    for i in consumed:
        if routed and i == 0:
            _route(x.dims[0], tensors[0])
        else:
            mark(x.dims[i], "looked up by index")
    kept = [x.dims[i] for i in range(x.rank) if i not in consumed]
    is_adjacent = consumed == list(range(consumed[0], consumed[0] + len(consumed)))
    at = consumed[0] if is_adjacent else 0
    positions = _positions(call, tensors, at, len(call.shape) - len(kept))
    order = x.order if routed and len(consumed) == len(positions) == 1 else None
    dims = kept[:at] + positions + kept[at:]
    return call.new(dims, weight=x.weight, order=order, looked_up=routed or x.looked_up)


def _route(experts: Dim, chosen: Value) -> None:
    """Weights of experts, gathered by an index that the router chose."""
    give_role(experts, "expert")
    if chosen.domain is not None:
        unify(experts, chosen.domain)
    mark(experts, "looked up by index", "routed")


def _at_known_positions(call: OpCall, x: Value, axis: int, index: Value) -> Value:
    """x[..., [-1], :]: consecutive positions that the program names are a slice."""
    total = size(x.dims[axis])
    positions = [n % total for n in index.numbers or ()]
    dims = list(x.dims)
    if index.rank == 1 and positions == list(range(positions[0], positions[0] + len(positions))):
        dims[axis] = narrow(dims[axis], positions[0], len(positions))
    else:
        mark(dims[axis], "looked up by index")
        extents = call.shape[axis : axis + index.rank]
        dims[axis : axis + 1] = [fresh(extent, "positions chosen by an index") for extent in extents]
    return call.new(dims)


def _indexed(call: OpCall) -> tuple[list[int], list[Value]]:
    """Which dimensions of x an index consumes (a mask consumes as many as it has), and the index tensors."""
    at = 0
    consumed: list[int] = []
    tensors: list[Value] = []
    for index in call.items("indices"):
        if not isinstance(index, Value):
            at += 1
            continue
        width = index.rank if index.dtype == "bool" else 1
        consumed += range(at, at + width)
        at += width
        tensors.append(index)
    return consumed, tensors


def _positions(call: OpCall, tensors: list[Value], at: int, rank: int) -> list[Dim]:
    """The dimensions that index tensors put in place of the dimensions they consume."""
    sizes = call.shape[at : at + rank]
    reason = "positions chosen by data"
    if any(t.dtype == "bool" for t in tensors):
        return [fresh(s, reason) for s in sizes]
    merged = broadcast(sizes, tensors, never)
    return [dim if size(dim) == extent else fresh(extent, reason) for dim, extent in zip(merged, sizes, strict=True)]


def index_select(call: OpCall) -> Value:
    """Positions of one dimension chosen by an index."""
    x = call.value("self")
    axis = call.axis()
    mark(x.dims[axis], "looked up by index")
    dims = list(x.dims)
    dims[axis] = fresh(call.shape[axis], "positions chosen by an index")
    return call.new(dims, weight=x.weight)


def gather(call: OpCall) -> Value:
    """Positions of one dimension chosen by an index that varies along the remaining ones."""
    x, chosen = call.value("self"), call.value("index")
    axis = call.axis()
    _mark_indexed(x.dims[axis], chosen.domain, "looked up by index")
    if chosen.rank != x.rank or len(call.shape) != x.rank:
        raise NotCovered("the index has another rank")
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        if i == axis:
            dims.append(fresh(call.shape[i], "positions chosen by an index"))
        elif size(dim) != call.shape[i]:
            mark(dim, "looked up by index")
            dims.append(fresh(call.shape[i], "positions chosen by an index"))
        else:
            unify(dim, chosen.dims[i])
            dims.append(remap(dim, const=False))
    return call.new(dims, tag=x.tag)


def take_along(call: OpCall) -> Value:
    """take_along_dim: as gather, but dimensions of size one of either tensor stand for all positions of the other."""
    x, chosen = call.value("self"), call.value("indices")
    if call.args.get("dim") is None or chosen.rank != x.rank:
        raise NotCovered("positions of the flattened tensor")
    axis = call.axis()
    _mark_indexed(x.dims[axis], chosen.domain, "looked up by index")
    pairs = zip(x.dims, chosen.dims, strict=True)
    dims = [
        remap(pair[1], zero=False, const=False) if i == axis else remap(meet(pair, as_first), const=False)
        for i, pair in enumerate(pairs)
    ]
    return call.new(dims, tag=x.tag)


def _mark_indexed(dim: Dim, domain: Dim | None, reason: str) -> None:
    """Mark a dimension that an index reads or writes: `routed` where the index holds positions of the same axes."""
    is_routed = domain is not None and same_axes(domain, dim)
    mark(dim, reason, "routed" if is_routed else "frozen")


def scatter(call: OpCall) -> Value:
    """scatter, scatter_add, index_add, index_copy: one dimension is written by index, the remaining ones meet."""
    x = call.value("self")
    axis = call.axis()
    operands = _operands_of_rank(call, x.rank)
    target, domain = x.dims[axis], call.value("index").domain
    _mark_indexed(target, domain, "written by index")
    if domain is not None and not same_axes(domain, target) and expand(target) and target[0].const:
        unify(target, domain)
    source = operands.get("src", operands.get("source"))
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        if i == axis:
            for operand in operands.values():
                mark(operand.dims[i], "written by index")
            dims.append(remap(dim, zero=False, const=False))
        else:
            beside = [operand.dims[i] for operand in operands.values()]
            dims.append(_written(dim, beside, source.dims[i] if source is not None else None))
    return call.new(dims)


def _operands_of_rank(call: OpCall, rank: int) -> dict[str, Value]:
    """Source and index of a scatter, where they have as many dimensions as the tensor that is written."""
    operands = {name: call.args.get(name) for name in ("src", "source", "index")}
    return {name: v for name, v in operands.items() if isinstance(v, Value) and v.rank == rank}


def _written(dim: Dim, operands: list[Dim], source: Dim | None) -> Dim:
    """A dimension that is not indexed, with that of source and index; without a source nothing is known of the result.

    operands: the dimension in all tensors that take part. source: the dimension in the tensor that is written.
    """
    is_whole = True
    for operand in operands:
        if size(operand) != size(dim):
            mark(dim, "partly written by index")
            mark(operand, "partly written by index")
            is_whole = False
        else:
            is_whole &= unify(dim, operand)
    if not is_whole or source is None:
        return remap(dim, zero=False, const=False)
    return meet([dim, source], all)


def index_put(call: OpCall) -> Value:
    """x[i, j] = values: indexed dimensions freeze, the remaining ones meet those of the values."""
    x, values = call.value("self"), call.value("values")
    consumed, _ = _indexed(call)
    kept = [i for i in range(x.rank) if i not in consumed]
    for i in consumed:
        mark(x.dims[i], "written by index")
    dims = list(x.dims)
    for back, i in enumerate(reversed(kept), 1):
        source = values.dims[-back] if back <= values.rank else ()
        if not expand(source):
            dims[i] = remap(dims[i], zero=False)
        elif i == x.rank - back:
            dims[i] = _written(dims[i], [source], source)
        else:
            for dim in (dims[i], *values.dims):
                mark(dim, "written by index")
    return call.new(dims)


def uniform(call: OpCall) -> Value:
    """zeros, ones, full: the same everywhere, so they bind no axis."""
    zero = "zero" in call.name or call.args.get("fill_value") == 0
    return Value(tuple(fresh(s, zero=zero, const=True) for s in call.shape))


def uniform_like(call: OpCall) -> Value:
    """zeros_like, ones_like, full_like, empty_like: the same everywhere, with the axes of the argument."""
    zero = "zero" in call.name or call.args.get("fill_value") == 0
    return Value(tuple(remap(d, zero=zero, const=True) for d in call.value("self").dims))


def counted(call: OpCall) -> Value:
    """arange and other constants whose entries differ: without one position the rest would have other numbers."""
    reason = f"its units are numbered by aten.{call.name}"
    return Value(tuple(fresh(s, reason) for s in call.shape))


def one_hot(call: OpCall) -> Value:
    """An index spread over classes: routing, or a table lookup by a product."""
    x = call.value("self")
    new = x.domain if x.domain is not None and size(x.domain) == call.shape[-1] else fresh(call.shape[-1])
    mark(new, "chosen by index (one_hot)", "routed")
    return call.new([*[remap(d, zero=False) for d in x.dims], new])


def data_decides(call: OpCall) -> Value | list[Value]:
    """nonzero, unique, searchsorted, ...: the result counts positions; it marks every axis of the arguments."""
    reason = f"positions are chosen by data ({call.name})"
    for value in call.tensors():
        for dim in value.dims:
            mark(dim, reason, "routed")
    results = [call.new(call.frozen_dims(reason, i)) for i in range(len(call.shapes))]
    return results if len(results) > 1 else results[0]


def counted_by_class(call: OpCall) -> Value | list[Value]:
    """histc and bincount of indices: one number for each position of the dimension that they index."""
    domain = call.value("self").domain
    if domain is None or size(domain) != call.shape[0]:
        return data_decides(call)
    mark(domain, f"its units are counted ({call.name})", "routed")
    return call.new([remap(domain, zero=False)])


def nothing(call: OpCall) -> Value:
    """A number read from a tensor, an assertion: no axes."""
    return call.new([])


RULES: dict[str, Rule] = {
    "embedding": embedding,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "take_along_dim": take_along,
    **dict.fromkeys(("scatter", "scatter_add", "index_add", "index_copy", "scatter_reduce"), scatter),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), index_put),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), uniform),
    **dict.fromkeys(("scalar_tensor", "empty_strided", "empty_permuted"), uniform),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "zero"), uniform_like),
    **dict.fromkeys(
        ("arange", "linspace", "eye", "tril_indices", "triu_indices", "rand", "randn", "logspace"), counted
    ),
    **dict.fromkeys(("rand_like", "randn_like", "hann_window", "randint"), counted),
    "one_hot": one_hot,
    **dict.fromkeys(("histc", "bincount"), counted_by_class),
    **dict.fromkeys(("nonzero", "nonzero_numpy", "searchsorted", "bucketize"), data_decides),
    **dict.fromkeys(("unique_consecutive", "_unique2", "unique_dim", "nonzero_static", "masked_select"), data_decides),
    **dict.fromkeys(("item", "_local_scalar_dense", "sym_size", "_assert_async"), nothing),
}
