"""Rules for matrix products, convolutions and attention: axes meet, and a summed axis must vanish at masked units."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from secateur.torch.trace.atoms import Dim, expand, first_reason, fresh, give_role, is_frozen, mark, size, unify, unite
from secateur.torch.trace.rules.elementwise import note_scale
from secateur.torch.trace.values import Contraction, NotCovered, OpCall, Rule, Value, meet, remap

Labels = Sequence[str]


@dataclass(frozen=True)
class _Pair:
    """The two operands of a product. Each dimension has a label; a label that the result lacks is summed over."""

    x: Value
    y: Value
    labels_x: Labels
    labels_y: Labels
    labels_out: Labels

    def __post_init__(self) -> None:
        if len(self.labels_x) != self.x.rank or len(self.labels_y) != self.y.rank:
            raise NotCovered("an operand has another rank")

    @cached_property
    def labels(self) -> list[str]:
        """Every label once."""
        return list(dict.fromkeys([*self.labels_x, *self.labels_y]))

    def dims_of(self, label: str) -> list[Dim]:
        """The dimensions with a label, those of x first."""
        labelled = [*zip(self.labels_x, self.x.dims, strict=True), *zip(self.labels_y, self.y.dims, strict=True)]
        return [dim for name, dim in labelled if name == label]

    @cached_property
    def whole(self) -> dict[str, Dim]:
        """For each label its dimension in full: the largest where operands are broadcast."""
        return {label: max(self.dims_of(label), key=size) for label in self.labels}

    @cached_property
    def summed(self) -> list[str]:
        """The labels that the result lacks."""
        return [label for label in self.labels if label not in self.labels_out]

    def shared(self) -> list[str]:
        """The labels that both operands have."""
        return [label for label in self.labels_x if label in self.labels_y]


def contract(call: OpCall, x: Value, y: Value, labels_x: Labels, labels_y: Labels, labels_out: Labels) -> Value:
    """The sum over every label that the result lacks; dimensions with the same label are one."""
    pair = _Pair(x, y, labels_x, labels_y, labels_out)
    out: dict[str, Dim] = {}
    for label in pair.labels:
        if label in labels_out:
            out[label] = meet(pair.dims_of(label), any)
        else:
            _sum_over(pair.dims_of(label))
    dims = [out[label] for label in labels_out]
    if x.weight or y.weight:
        _note_weight(call, pair)
        return call.new(dims)
    call.record.contractions.append(Contraction(None, -1, None, list(pair.whole.values())))
    over = tuple(factor for label in pair.summed for factor in pair.whole[label])
    tag = _give_attention_roles(call, pair)
    return call.new(dims, tag=tag, over=over if tag else None)


def _sum_over(dims: list[Dim]) -> None:
    """Unite the dimensions of a summed label: at a masked unit, one of the operands must be zero."""
    present = [dim for dim in dims if expand(dim)]
    if present and unite(present):
        for factor in meet(present, any):
            if not factor.zero:
                mark((factor,), "summed over where a masked unit need not vanish")


def _note_weight(call: OpCall, pair: _Pair) -> None:
    """Record the product for counting, and give roles to the axes of its weight."""
    weight, labels, activation = (pair.y, pair.labels_y, pair.x) if pair.y.weight else (pair.x, pair.labels_x, pair.y)
    dims = list(pair.whole.values())
    if activation.weight is not None:
        call.record.contractions.append(Contraction(None, -1, None, dims))
        return
    summed = [label for label in labels if label in pair.summed]
    in_dim = None
    if weight.order is not None and len(summed) == 1:
        in_dim = weight.order[list(labels).index(summed[0])]
    call.record.contractions.append(Contraction(weight.weight, activation.key, in_dim, dims))
    for label, dim in zip(labels, weight.dims, strict=True):
        is_batch = label in pair.labels_out and label in pair.shared()
        if not (weight.looked_up and is_batch):
            give_role(dim, "read" if label in summed else "written")


def _give_attention_roles(call: OpCall, pair: _Pair) -> str:
    """Attention by matrix products: scores, then their softmax times the values. The tag of the result."""
    x, y = pair.x, pair.y
    for label in pair.shared():
        if label in pair.labels_out:
            _note_batch(call, pair, label)
    if "prob" in (x.tag, y.tag):
        values = (y, pair.labels_y) if x.tag == "prob" else (x, pair.labels_x)
        for label, dim in zip(values[1], values[0].dims, strict=True):
            if label not in pair.shared():
                _role(dim, "v")
        return ""
    for label in pair.shared():
        if label in pair.summed:
            _role(pair.whole[label], "qk")
    return "score"


def _note_batch(call: OpCall, pair: _Pair, label: str) -> None:
    """A dimension that both activations have and the result keeps: heads of an attention, or of a mixer."""
    left = pair.x.dims[list(pair.labels_x).index(label)]
    right = pair.y.dims[list(pair.labels_y).index(label)]
    if not expand(left):
        return
    if pair.x.tag == "prob":
        call.record.heads.append((left, right))
    elif pair.y.tag == "prob":
        call.record.heads.append((right, left))
    else:
        call.record.mixers.append(left)


def _role(dim: Dim, role: str) -> None:
    if expand(dim) and not is_frozen(dim):
        give_role(dim, role)


def linear(call: OpCall) -> Value:
    """x @ weight.T + bias."""
    out = _matmul(call, call.value("input"), call.value("weight"), transposed=True)
    return add_bias(out, call.optional("bias"))


def add_bias(out: Value, bias: Value | None, dim: int = -1) -> Value:
    """Add a bias along one dimension (a bias of more dimensions is aligned with the last ones).

    The result is zero at a masked unit where the bias is too.
    """
    if bias is None or not out.dims:
        return out
    dims = list(out.dims)
    for i, old in enumerate(out.dims):
        if bias.rank > 1:
            at = bias.rank - out.rank + i
        else:
            at = 0 if i == dim % out.rank else -1
        dims[i] = meet([old, bias.dims[at] if 0 <= at < bias.rank else ()], all)
    return Value(tuple(dims), data=out.data, tag=out.tag)


def _matmul(call: OpCall, x: Value, y: Value, *, transposed: bool = False) -> Value:
    if not x.rank or not y.rank:
        raise NotCovered("an operand is a scalar")
    batch = [f"b{i}" for i in range(max(x.rank, y.rank) - 2)]
    left, right = ["m", "k"][-x.rank :], (["n", "k"] if transposed else ["k", "n"])
    right = right if y.rank > 1 else ["k"]
    left = batch[len(batch) - max(x.rank - 2, 0) :] + left
    right = batch[len(batch) - max(y.rank - 2, 0) :] + right
    out = [*batch, *[label for label in ("m", "n") if label in left or label in right]]
    return contract(call, x, y, left, right, out)


def matmul(call: OpCall) -> Value:
    """matmul, mm, bmm, mv, dot."""
    return _matmul(call, call.value("self", "input"), call.value("other", "mat2", "vec", "vec2", "tensor"))


def addmm(call: OpCall) -> Value:
    """bias + x @ y (addmm, baddbmm)."""
    if call.get("beta", 1) == 0:
        return _product_of_two(call)
    return add_bias(_product_of_two(call), call.value("self"))


def _product_of_two(call: OpCall) -> Value:
    return _matmul(call, call.value("mat1", "batch1"), call.value("mat2", "batch2"))


def einsum(call: OpCall) -> Value:
    """Einstein summation over two operands."""
    equation = str(call.get("equation")).replace(" ", "")
    values = call.values("tensors")
    if "..." in equation or "->" not in equation or len(values) != 2:
        return call.frozen(f"no rule for einsum {equation}")
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
    dims = list(scores.dims)
    bias = call.optional("attn_mask")
    if bias is not None:
        if bias.rank > scores.rank:
            raise NotCovered("the mask has more dimensions than the scores")
        for i in range(1, bias.rank + 1):
            if expand(bias.dims[-i]):
                unify(dims[-i], bias.dims[-i])
    mark(k.dims[-2], "attended positions")
    prob = Value(tuple(remap(d, zero=False) for d in dims), data=True, tag="prob")
    return contract(call, prob, v, [*batch, "m", "n"], [*batch, "n", "d"], [*batch, "m", "d"])


def _repeated(q: Value, k: Value) -> Value:
    """Keys or values whose heads serve a group of query heads each."""
    if q.rank < 3:
        raise NotCovered("the query has no head dimension")
    groups = size(q.dims[-3]) // size(k.dims[-3])
    heads = tuple(expand(k.dims[-3]))
    if groups > 1:
        heads += fresh(groups, const=True)
    return Value((*k.dims[:-3], heads, *k.dims[-2:]), data=k.data, tag=k.tag)


def convolution(call: OpCall) -> Value:
    """conv1d, conv2d, conv3d: channels meet the weight, positions freeze."""
    x, weight = call.value("input"), call.value("weight")
    at = x.rank - weight.rank + 1
    batch, channels = x.dims[:at], x.dims[at]
    for dim in [*x.dims[at + 1 :], *weight.dims[2:]]:
        mark(dim, "positions of a convolution")
    out = _meet_channels(channels, weight, call.integer("groups", 1))
    counted, positions = ([fresh(n, "positions of a convolution") for n in call.shape[at + 1 :]] for _ in range(2))
    call.record.contractions.append(Contraction(weight.weight, x.key, None, [*weight.dims, *batch, *counted]))
    return add_bias(call.new([*batch, out, *positions]), call.optional("bias"), at)


def _meet_channels(channels: Dim, weight: Value, groups: int) -> Dim:
    """Unite the channels that a convolution reads with its weight; the channels that it writes."""
    written, read = weight.dims[:2]
    if groups == size(channels) == size(written):  # depthwise
        return meet([channels, written], any)
    lead = fresh(groups, "numbers the groups of a convolution", zero=True) if groups > 1 else ()
    unify(lead + tuple(expand(read)), channels)
    _sum_over([tuple(expand(channels))[len(expand(lead)) :], read])
    unify(written, lead + fresh(size(written) // groups))
    give_role(read, "read")
    give_role(written, "written")
    return written


def grouped(call: OpCall) -> Value:
    """_grouped_mm: rows sorted by expert; each range of rows times the matrix of its expert."""
    x, y = call.value("self"), call.value("mat2")
    if y.rank != 3 or x.rank != 2:
        return call.frozen("no rule for a grouped product of this shape")
    give_role(y.dims[0], "expert")
    offsets = call.optional("offs")
    if offsets is not None:
        unify(y.dims[0], offsets.dims[0])
    mark(y.dims[0], first_reason(y.dims[0], "tokens are routed over it"), "routed")
    picked = Value(y.dims[1:], data=True, weight=y.weight, order=y.order[1:] if y.order else None, looked_up=True)
    return contract(call, x, picked, ["m", "k"], ["k", "n"], ["m", "n"])


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), addmm),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "_grouped_mm": grouped,
    "grouped_mm": grouped,
}
