"""Rules for matrix products, convolutions and attention: axes meet, and a summed axis must vanish at masked units."""

from collections.abc import Sequence

from secateur.torch.trace.atoms import Dim, Factor, expand, first_reason, fresh, give_role, is_frozen, mark, size, unify
from secateur.torch.trace.rules.elementwise import note_scale
from secateur.torch.trace.values import Contraction, OpCall, Rule, Value, remap

Labels = Sequence[str]


def contract(call: OpCall, x: Value, y: Value, labels_x: Labels, labels_y: Labels, labels_out: Labels) -> Value:
    """The sum over every label that the result lacks; dimensions with the same label are one."""
    out: dict[str, Dim] = {}
    everything: dict[str, Dim] = {}
    for label in dict.fromkeys([*labels_x, *labels_y]):
        left = [d for d, name in zip(x.dims, labels_x, strict=True) if name == label]
        right = [d for d, name in zip(y.dims, labels_y, strict=True) if name == label]
        everything[label] = max([*left, *right], key=lambda d: size(expand(d)))
        shared = [d for d in left + right if expand(d)]
        out[label] = _meet(shared, summed=label not in labels_out)
    weight = _note(call, x, y, labels_x, labels_y, labels_out, everything)
    tag = ""
    if weight is None:
        tag = _activation_roles(call, x, y, labels_x, labels_y, labels_out, everything)
    over = tuple(f for label in everything if label not in labels_out for f in everything[label]) if tag else None
    return call.new([out[label] for label in labels_out], tag=tag, over=over)


def _meet(dims: list[Dim], summed: bool) -> Dim:
    """Unite the dimensions of a label. A summed axis must be zero at masked units in one operand."""
    if not dims:
        return ()
    whole = True
    for other in dims[1:]:
        whole &= unify(dims[0], other)
    if not whole:
        return remap(dims[0], zero=False, const=False)
    opened = [expand(d) for d in dims]
    result = []
    for i, factor in enumerate(opened[0]):
        zero = any(o[i].zero for o in opened)
        if summed and not zero:
            mark((factor,), "summed over where a masked unit need not vanish")
        result.append(Factor(factor.atom, zero, all(o[i].const for o in opened)))
    return tuple(result)


def _note(
    call: OpCall, x: Value, y: Value, lx: Labels, ly: Labels, lo: Labels, everything: dict[str, Dim]
) -> str | None:
    """Remember the product for counting, and give roles to the axes of a weight."""
    weight, labels, other = (y, ly, x) if y.weight else (x, lx, y)
    summed = [name for name in labels if name not in lo]
    name = weight.weight
    if name is None or other.weight is not None:
        call.record.contractions.append(Contraction(None, -1, None, list(everything.values())))
        return None if not (x.weight or y.weight) else x.weight or y.weight
    in_dim = None
    if weight.order is not None and len(summed) == 1:
        in_dim = weight.order[list(labels).index(summed[0])]
    call.record.contractions.append(Contraction(name, other.key, in_dim, list(everything.values()), weight.looked_up))
    for label, dim in zip(labels, weight.dims, strict=True):
        if weight.looked_up and label in (lx if weight is y else ly) and label in lo:
            continue
        give_role(dim, "read" if label in summed else "written")
    return name


def _activation_roles(
    call: OpCall, x: Value, y: Value, lx: Labels, ly: Labels, lo: Labels, everything: dict[str, Dim]
) -> str:
    """Attention by matrix products: scores, then their softmax times the values."""
    batch = [name for name in lx if name in ly and name in lo]
    summed = [name for name in lx if name in ly and name not in lo]
    only_x = [d for d, name in zip(x.dims, lx, strict=True) if name not in ly]
    only_y = [d for d, name in zip(y.dims, ly, strict=True) if name not in lx]
    for label in batch:
        left = x.dims[list(lx).index(label)]
        right = y.dims[list(ly).index(label)]
        if not expand(left):
            continue
        if "prob" in (x.tag, y.tag):
            call.record.heads.append((left, right) if x.tag == "prob" else (right, left))
        else:
            call.record.mixers.append(left)
    value_side = only_y if x.tag == "prob" else only_x if y.tag == "prob" else None
    if value_side is not None:
        for dim in value_side:
            _role(dim, "v")
        return ""
    for label in summed:
        _role(everything[label], "qk")
    return "score"


def _role(dim: Dim, role: str) -> None:
    if expand(dim) and not is_frozen(dim):
        give_role(dim, role)


def linear(call: OpCall) -> Value:
    """x @ weight.T + bias."""
    x, weight = call.value("input"), call.value("weight")
    out = _matmul(call, x, weight, transposed=True)
    return _biased(call, out, call.args.get("bias"))


def _biased(call: OpCall, out: Value, bias: Value | None, dim: int = -1) -> Value:
    """Add a bias along one dimension: the result is zero at a masked unit where the bias is too."""
    if bias is None:
        return out
    dims = list(out.dims)
    dim %= len(dims)
    for i, old in enumerate(dims):
        at = bias.rank - (len(dims) - i) if bias.rank > 1 else (0 if i == dim else -1)
        mine = bias.dims[at] if 0 <= at < bias.rank else ()
        dims[i] = _added(old, mine)
    return Value(tuple(dims), data=out.data, tag=out.tag)


def _added(old: Dim, bias: Dim) -> Dim:
    if not expand(bias):
        return remap(old, zero=False)
    if not unify(old, bias):
        return remap(old, zero=False, const=False)
    return tuple(
        Factor(a.atom, a.zero and b.zero, a.const and b.const) for a, b in zip(expand(old), expand(bias), strict=True)
    )


def _matmul(call: OpCall, x: Value, y: Value, transposed: bool = False) -> Value:
    batch = [f"b{i}" for i in range(max(x.rank, y.rank) - 2)]
    left = (["m", "k"] if x.rank > 1 else ["k"])[-max(x.rank, 1) :]
    right = ["k", "n"] if y.rank > 1 else ["k"]
    if transposed:
        right = ["n", "k"] if y.rank > 1 else ["k"]
    left = batch[len(batch) - max(x.rank - 2, 0) :] + left
    right = batch[len(batch) - max(y.rank - 2, 0) :] + right
    out = [*batch, *[name for name in ("m", "n") if name in left or name in right]]
    return contract(call, x, y, left, right, out)


def matmul(call: OpCall) -> Value:
    """matmul, mm, bmm, mv, dot."""
    names = [n for n in ("self", "input") if n in call.args]
    other = next(n for n in ("other", "mat2", "vec", "vec2", "tensor") if n in call.args)
    return _matmul(call, call.value(names[0]), call.value(other))


def addmm(call: OpCall) -> Value:
    """bias + x @ y (addmm, baddbmm)."""
    if call.get("beta", 1) == 0:
        return _product_of_two(call)
    return _biased(call, _product_of_two(call), call.value("self"))


def _product_of_two(call: OpCall) -> Value:
    first, second = ("mat1", "mat2") if "mat1" in call.args else ("batch1", "batch2")
    return _matmul(call, call.value(first), call.value(second))


def einsum(call: OpCall) -> Value:
    """Einstein summation over one or two operands."""
    equation = str(call.args["equation"]).replace(" ", "")
    values = [v for v in call.args["tensors"] if isinstance(v, Value)]
    if "..." in equation or "->" not in equation or len(values) != 2:
        reason = f"no rule for einsum {equation}"
        call.freeze_all(reason)
        return call.new(call.frozen_dims(reason))
    inputs, out = equation.split("->")
    first, second = inputs.split(",")
    return contract(call, values[0], values[1], first, second, out)


def attention(call: OpCall) -> Value:
    """scaled_dot_product_attention: heads, query/key and value dimensions get their roles."""
    q, k, v = call.value("query"), call.value("key"), call.value("value")
    if call.args.get("enable_gqa"):
        k, v = _repeated(q, k), _repeated(q, v)
    batch = [f"b{i}" for i in range(q.rank - 2)]
    scores = contract(call, q, k, [*batch, "m", "k"], [*batch, "n", "k"], [*batch, "m", "n"])
    if call.args.get("scale") is None:
        mark(q.dims[-1], "the attention scale follows its size")
    note_scale(call, [q, k], "scale")
    for factor in expand(q.dims[-2]):
        _role((factor,), "group")
    bias = call.args.get("attn_mask")
    dims = list(scores.dims)
    if isinstance(bias, Value):
        for i in range(1, bias.rank + 1):
            if expand(bias.dims[-i]):
                unify(dims[-i], bias.dims[-i])
    mark(k.dims[-2], "attended positions")
    dims = [remap(d, zero=False, const=None) for d in dims]
    prob = Value(tuple(dims), data=True, tag="prob")
    return contract(call, prob, v, [*batch, "m", "n"], [*batch, "n", "d"], [*batch, "m", "d"])


def _repeated(q: Value, k: Value) -> Value:
    """Keys or values whose heads serve a group of query heads each."""
    wanted, there = size(expand(q.dims[-3])), size(expand(k.dims[-3]))
    heads = tuple(expand(k.dims[-3]))
    if wanted != there:
        heads += fresh(wanted // there, const=True)
    return Value((*k.dims[:-3], heads, *k.dims[-2:]), data=k.data, tag=k.tag)


def convolution(call: OpCall) -> Value:
    """conv1d, conv2d, conv3d: channels meet the weight, positions freeze."""
    x, weight = call.value("input"), call.value("weight")
    groups = int(call.get("groups", 1))
    spatial = weight.rank - 2
    channel_at = x.rank - spatial - 1
    channels = x.dims[channel_at]
    for dim in [*x.dims[channel_at + 1 :], *weight.dims[2:]]:
        mark(dim, "positions of a convolution")
    lead = fresh(groups, "numbers the groups of a convolution", zero=True) if groups > 1 else ()
    depthwise = groups == size(expand(channels)) == size(expand(weight.dims[0]))
    if depthwise:
        out = _meet([channels, weight.dims[0]], summed=False)
    else:
        unify(lead + tuple(expand(weight.dims[1])), channels)
        _meet([tuple(expand(channels))[len(expand(lead)) :], weight.dims[1]], summed=True)
        unify(weight.dims[0], lead + fresh(size(expand(weight.dims[0])) // groups))
        out = weight.dims[0]
        give_role(weight.dims[1], "read")
        give_role(weight.dims[0], "written")
    call.record.contractions.append(
        Contraction(weight.weight, x.key, None, [*weight.dims, *_places(call, x.dims[:channel_at], spatial)])
    )
    positions = [fresh(s, "positions of a convolution") for s in call.shape[channel_at + 1 :]]
    result = call.new([*x.dims[:channel_at], out, *positions])
    return _biased(call, result, call.args.get("bias"), channel_at)


def _places(call: OpCall, batch: Sequence[Dim], spatial: int) -> list[Dim]:
    return [*batch, *[fresh(s, "positions") for s in call.shape[-spatial:]]]


def grouped(call: OpCall) -> Value:
    """_grouped_mm: rows sorted by expert, each range times the matrix of its expert."""
    x, y = call.value("self"), call.value("mat2")
    if y.rank != 3 or x.rank != 2:
        reason = "no rule for a grouped product of this shape"
        call.freeze_all(reason)
        return call.new(call.frozen_dims(reason))
    give_role(y.dims[0], "expert")
    offsets = call.args.get("offs")
    if isinstance(offsets, Value):
        unify(y.dims[0], offsets.dims[0])
    mark(y.dims[0], first_reason(y.dims[0], "tokens are routed over it"), "routed")
    picked = Value(y.dims[1:], data=True, weight=y.weight, order=y.order[1:] if y.order else None, looked_up=True)
    return contract(call, x, picked, ["m", "k"], ["k", "n"], ["m", "n"])


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "__matmul__"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "_grouped_mm": grouped,
    "grouped_mm": grouped,
}
