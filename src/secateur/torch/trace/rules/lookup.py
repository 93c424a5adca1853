"""Rules for operations that read or write positions named by an index tensor, and for constants."""

from secateur.torch.trace.atoms import Dim, Factor, expand, fresh, give_role, is_frozen, mark, narrow, unify
from secateur.torch.trace.values import OpCall, Rule, Value, broadcast, remap


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
    """x[i, j, :]: the dimensions with an index are looked up; the others pass."""
    x = call.value("self")
    consumed, tensors = _indexed(call, x)
    if len(consumed) == 1 and tensors[0].numbers:
        return _at_known_positions(call, x, consumed[0], tensors[0])
    routed = consumed[:1] == [0] and x.weight is not None and tensors[0].data and tensors[0].dtype == "int"
    for i in consumed:
        if routed and i == 0:
            give_role(x.dims[0], "expert")
            if tensors[0].domain is not None:
                unify(x.dims[0], tensors[0].domain)
        mark(x.dims[i], "looked up by index", "routed" if routed and i == 0 else "frozen")
    kept = [x.dims[i] for i in range(x.rank) if i not in consumed]
    adjacent = consumed == list(range(consumed[0], consumed[0] + len(consumed)))
    at = consumed[0] if adjacent else 0
    positions = _positions(call, tensors, at, len(call.shape) - len(kept))
    order = x.order if routed and len(consumed) == len(positions) == 1 else None
    dims = kept[:at] + positions + kept[at:]
    return call.new(dims, weight=x.weight, order=order, looked_up=routed or x.looked_up)


def _at_known_positions(call: OpCall, x: Value, axis: int, index: Value) -> Value:
    """x[..., [-1], :]: consecutive positions that the program names are a slice."""
    assert index.numbers is not None
    total = _extent(x.dims[axis])
    positions = [n % total for n in index.numbers]
    dims = list(x.dims)
    if index.rank == 1 and positions == list(range(positions[0], positions[0] + len(positions))):
        dims[axis] = narrow(dims[axis], positions[0], len(positions))
    else:
        mark(dims[axis], "looked up by index")
        dims[axis : axis + 1] = [fresh(s, "positions chosen by an index") for s in call.shape[axis : axis + index.rank]]
    return call.new(dims)


def _indexed(call: OpCall, x: Value) -> tuple[list[int], list[Value]]:
    """Which dimensions of x an index consumes (a mask consumes as many as it has), and the index tensors."""
    at, consumed, tensors = 0, [], []
    for pick in call.args["indices"]:
        if not isinstance(pick, Value):
            at += 1
            continue
        width = pick.rank if pick.dtype == "bool" else 1
        consumed += list(range(at, at + width))
        at += width
        tensors.append(pick)
    return consumed, tensors


def _positions(call: OpCall, tensors: list[Value], at: int, rank: int) -> list[Dim]:
    """The dimensions that index tensors put in the place of those they consume."""
    sizes = call.shape[at : at + rank]
    reason = "positions chosen by data"
    if any(t.dtype == "bool" for t in tensors):
        return [fresh(s, reason) for s in sizes]
    merged = broadcast(call, tensors, lambda flags: False, sizes)
    return [d if _extent(d) == s else fresh(s, reason) for d, s in zip(merged, sizes, strict=True)]


def _extent(dim: Dim) -> int:
    total = 1
    for f in expand(dim):
        total *= f.atom.size
    return total


def index_select(call: OpCall) -> Value:
    """Positions of one dimension chosen by an index."""
    x = call.value("self")
    axis = call.axis()
    mark(x.dims[axis], "looked up by index")
    dims = list(x.dims)
    dims[axis] = fresh(call.shape[axis], "positions chosen by an index")
    return call.new(dims, weight=x.weight)


def gather(call: OpCall) -> Value:
    """Positions of one dimension chosen by an index that varies along the others."""
    x, chosen = call.value("self"), call.value("index")
    axis = call.axis()
    ranked = chosen.domain is not None and _same(chosen.domain, x.dims[axis])
    mark(x.dims[axis], "looked up by index", "routed" if ranked else "frozen")
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        if i == axis:
            dims.append(fresh(call.shape[i], "positions chosen by an index"))
        elif _extent(dim) != call.shape[i]:
            mark(dim, "looked up by index")
            dims.append(fresh(call.shape[i], "positions chosen by an index"))
        else:
            unify(dim, chosen.dims[i])
            dims.append(remap(dim, const=False))
    return call.new(dims, tag=x.tag)


def _same(a: Dim, b: Dim) -> bool:
    return [f.atom for f in expand(a)] == [f.atom for f in expand(b)]


def scatter(call: OpCall) -> Value:
    """scatter, scatter_add, index_add, index_copy: one dimension is written by index, the others meet."""
    x = call.value("self")
    source = call.args.get("src", call.args.get("source"))
    axis = call.axis()
    chosen = call.args.get("index")
    domain = chosen.domain if isinstance(chosen, Value) else None
    ranked = domain is not None and _same(domain, x.dims[axis])
    mark(x.dims[axis], "written by index", "routed" if ranked else "frozen")
    if domain is not None and not ranked and expand(x.dims[axis])[:1] and x.dims[axis][0].const:
        unify(x.dims[axis], domain)
    others = [v for v in (source, call.args.get("index")) if isinstance(v, Value) and v.rank == x.rank]
    dims: list[Dim] = []
    for i, dim in enumerate(x.dims):
        if i == axis:
            for other in others:
                mark(other.dims[i], "written by index")
            dims.append(remap(dim, zero=False, const=False))
            continue
        dims.append(_written(dim, [v.dims[i] for v in others], source, i))
    return call.new(dims)


def _written(dim: Dim, others: list[Dim], source: object, i: int) -> Dim:
    whole = True
    for other in others:
        if _extent(other) != _extent(dim):
            mark(dim, "partly written by index")
            mark(other, "partly written by index")
            whole = False
        else:
            whole &= unify(dim, other)
    if not whole or not isinstance(source, Value) or source.rank <= i:
        return remap(dim, zero=False, const=False)
    pairs = zip(expand(dim), expand(source.dims[i]), strict=True)
    return tuple(Factor(a.atom, a.zero and b.zero, a.const and b.const) for a, b in pairs)


def index_put(call: OpCall) -> Value:
    """x[i, j] = values: indexed dimensions freeze, the others meet those of the values."""
    x, values = call.value("self"), call.value("values")
    consumed, _ = _indexed(call, x)
    kept = [i for i in range(x.rank) if i not in consumed]
    for i, dim in enumerate(x.dims):
        if i not in kept:
            mark(dim, "written by index")
    dims = list(x.dims)
    for back, i in enumerate(reversed(kept), 1):
        trailing = kept[-back:] == list(range(x.rank - back, x.rank))
        if not trailing or back > values.rank:
            if back > values.rank or _extent(values.dims[-back]) == 1:
                dims[i] = remap(dims[i], zero=False)
                continue
            mark(dims[i], "written by index")
            for dim in values.dims:
                mark(dim, "written by index")
        elif not expand(values.dims[-back]):
            dims[i] = remap(dims[i], zero=False)
        else:
            dims[i] = _written(dims[i], [values.dims[-back]], values, values.rank - back)
            if not is_frozen(dims[i]) and _extent(dims[i]) != _extent(values.dims[-back]):
                dims[i] = remap(dims[i], zero=False)
    return call.new(dims)


def uniform(call: OpCall) -> Value:
    """zeros, ones, full: the same everywhere, so no axis is bound by it."""
    zero = "zero" in call.name or call.args.get("fill_value") == 0
    return Value(tuple(fresh(s, zero=zero, const=True) for s in call.shape))


def uniform_like(call: OpCall) -> Value:
    """zeros_like, ones_like, full_like, empty_like: uniform with the axes of the argument."""
    zero = "zero" in call.name or call.args.get("fill_value") == 0
    return Value(tuple(remap(d, zero=zero, const=True) for d in call.value("self").dims))


def counted(call: OpCall) -> Value:
    """arange and other constants whose entries differ: removing a position would renumber the others."""
    reason = f"its units are numbered by aten.{call.name}"
    return Value(tuple(fresh(s, reason) for s in call.shape))


def one_hot(call: OpCall) -> Value:
    """An index spread over classes: routing, or a table lookup by a product."""
    x = call.value("self")
    new = x.domain if x.domain is not None and _extent(x.domain) == call.shape[-1] else fresh(call.shape[-1])
    mark(new, "chosen by index (one_hot)", "routed")
    return call.new([*[remap(d, zero=False) for d in x.dims], new])


def data_decides(call: OpCall) -> Value | list[Value]:
    """nonzero, unique, bincount, searchsorted, ...: the result counts positions; axes that enter are bound."""
    reason = f"positions are chosen by data ({call.name})"
    for value in call.tensors():
        for dim in value.dims:
            mark(dim, reason, "routed")
    results = [call.new(call.frozen_dims(reason, i)) for i in range(len(call.shapes))]
    return results if len(results) > 1 else results[0]


def counted_by_class(call: OpCall) -> Value:
    """histc and bincount of indices: one number for each position of what they index."""
    domain = call.value("self").domain
    if domain is None or _extent(domain) != call.shape[0]:
        result = data_decides(call)
        assert isinstance(result, Value)
        return result
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
    "take_along_dim": gather,
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
