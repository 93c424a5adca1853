"""What each rule makes of its operation, as a table: the reference for those who write or mend a rule.

A row: arguments | call | results; what becomes of the axes. The call names its arguments x, y, z, u, v in order:
`s:3 h:8` is an activation with the axes s and h, `w h:8` a weight, `i s:3` holds integers, `m s:3` is a mask; all are
zero where a unit is masked. The results, written once when they are all alike:

    h              the axis h; the result is zero where a unit of h is masked
    h~             the axis h; the result need not be zero there
    (h0*h1) (h+g)  a product or a sum of axes; h0 and h1 are parts of h
    4 4=           a new axis; with = the result is the same along it
    1              a dimension of size one
    ; g=h          g and h are one axis from here on
    ; h: why       h is frozen
    ; h how: why   h is frozen, but for some kinds of axes
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.export.graph_signature import InputKind

from secateur.torch.trace.atoms import expand, fresh, leaves
from secateur.torch.trace.nodes import plain_name
from secateur.torch.trace.propagate import Propagation
from secateur.torch.trace.rules import RULES
from secateur.torch.trace.rules.elementwise import KEEPS_ZERO, MAKES_NONZERO

OF_MASKS = "logical_and __and__ bitwise_and logical_or logical_xor __or__ bitwise_or bitwise_xor __xor__ bitwise_not"
OF_INTEGERS = "__lshift__ __rshift__ bitwise_left_shift bitwise_right_shift"
OF_TWO = "eq ne lt le gt ge atan2 isclose fmod"
OTHERS = {*f"{OF_MASKS} {OF_INTEGERS} {OF_TWO} threshold".split()}
ZERO_AT_ZERO = " ".join(name for name in KEEPS_ZERO if name not in OTHERS)
NOT_ZERO_AT_ZERO = " ".join(name for name in MAKES_NONZERO if name not in OTHERS)

ELEMENTWISE = """
s:3 h:8 | each(ZERO_AT_ZERO, x) | s h
s:3 h:8 | each(NOT_ZERO_AT_ZERO, x) | s~ h~
s:3 h:8, t:3 g:8 | each(OF_TWO, x, y) | s~ h~; t=s; g=h
i s:3 h:8, i t:3 g:8 | each(OF_INTEGERS, x, y) | s~ h~; t=s; g=h
m s:3 h:8, m t:3 g:8 | each("logical_and __and__ bitwise_and", x, y) | s h; t=s; g=h
m s:3 h:8, m t:3 g:8 | each("logical_or logical_xor __or__ bitwise_or bitwise_xor __xor__", x, y) | s~ h~; t=s; g=h
m s:3 h:8 | ~x | s~ h~
s:3 h:8 | F.threshold(x, 0.1, 20.0) | s~ h~
s:3 h:8, w g:8 | F.prelu(x, y) | s h; g=h
s:3 h:8, w g:8 | F.prelu(x.exp(), y) | s~ h~; g=h
b:2 c:8 y:8, w g:8 | F.prelu(x, y) | b c y; g=c
b:2 c:8 y:5 x:4, w g:8 | F.prelu(x, y) | b c y x; g=c
b:2 c:8 y:5, w g:1 | F.prelu(x, y) | b c y
s:3 h:8 | each("contiguous clone alias detach lift_fresh_copy positive", x) | s h
s:3 h:8 | each("conj resolve_conj resolve_neg _conj_physical", x) | s h
s:3 h:8 | F.dropout(x, training=False).to(torch.float64) | s h
s:3 h:8, t:3 g:8 | each("add sub rsub subtract", x, y) | s h; t=s; g=h
s:3 h:8 | x + 1 | s~ h~
s:3 h:8, g:8 | each("mul multiply", x, y) | s h; g=h
s:3 h:8 | x * 0.3 | s h; s h scaled: a scale beside it is computed and may follow its size
s:3 h:8, t:3 g:8 | each("div divide true_divide floor_divide remainder", x, y) | s h; t=s; g=h
s:3 h:8, t:3 g:8 | each("maximum minimum fmax fmin", x, y) | s h; t=s; g=h
s:3 h:8, t:3 g:8, u:3 f:8 | each("addcmul addcdiv lerp", x, y, z) | s h; t=s; g=h; u=s; f=h
s:3 h:8 | x.clamp(-1, 1), F.hardtanh(x), x.clamp_min(0) | s h
s:3 h:8 | aten.clip(x, 0.5, 1), x.clamp_max(-1) | s~ h~
s:3 h:8 | x**2 | s h
s:3 h:8 | x**-2 | s~ h~
m s:3 h:8, t:3 g:8, u:3 f:8 | torch.where(x, y, z) | s h; t=s; g=h; u=s; f=h
m s:3 h:8, t:3 g:8 | torch.where(x, y, 1.0) | s~ h~; t=s; g=h
s:3 h:8, m t:3 g:8 | x.masked_fill(y, 0), x.masked_fill(y, 1) | s h, s~ h~; t=s; g=h
s:3 h:8 | F.glu(x) | s h0; h1=h0
s:3 h:8 | aten.fill(x, 2.0) | s~ h~
"""

SHAPES = """
s:3 h:8 | x.view(3, 2, 4) | s h0 h1
s:3 h:8 | x.reshape(24), aten._unsafe_view(x, [24]), x.flatten() | (s*h)
s:3 h:8 | x.view(4, 6) | 4 6; s h: a view regroups it across the bounds of its units
s:6 h:8 | x.unflatten(0, (2, 3)) | s0 s1 h
s:3 h:8, t:3 g:8 | x.view_as(y), x.reshape_as(y) | s h
s:3 h:8 | x.transpose(0, 1), x.swapaxes(0, 1), x.swapdims(0, 1), *each("t numpy_T mT mH adjoint", x) | h s
s:3 h:8 d:5 | x.permute(2, 0, 1) | d s h
s:3 h:8 d:5 | x.movedim(0, 2), x.moveaxis(0, 2) | h d s
s:3 o:1 h:8 | x.unsqueeze(1), x.squeeze(1), x.squeeze() | s 1 1 h, s h, s h
s:3 o:1 h:8 | x.expand(3, 4, 8) | s 4= h
h:8, t:3 g:8 | x.expand_as(y), x.broadcast_to(3, 8) | 3= h
s:3 h:8 | x.repeat(1, 2), x.tile(2) | s (2=*h)
s:3 h:8 | x.repeat_interleave(2, dim=1) | s (h*2=)
s:3 h:8 | x[:, :3], x[:, 3:], x.narrow(1, 3, 5) | s h0, s h1, s h1
s:3 h:8 | x[:, ::2], x[:, 1::2] | s h0; h1: numbers the parts of interleaved pairs
s:3 h:8 | x[:, 1:7:3] | s 2; h: taken in steps
s:3 h:8 | x[:, 0] | s; h: single positions are taken from it
s:3 h:8 | x.view(3, 2, 4)[:, 1] | s h1; h0: single positions are taken from it
s:3 h:8 | x.split([2, 6], 1) | s h0, s h1
s:3 h:8 | *x.split(4, 1), *x.chunk(2, 1), *x.tensor_split(2, 1), *x.unsafe_split(4, 1) | s h0, s h1, s h0, s h1, s
    h0, s h1, s h0, s h1
s:3 h:8 | x.unbind(0) | h; s: single positions are taken from it
s:3 h:8, t:3 g:8 | torch.cat([x, y], 1) | s (h+g); t=s
s:3 h:8 | torch.cat([x, x], 1) | s (2*h)
s:3 h:8, t:3 g:8 | torch.stack([x, y], 1) | s 2 h; t=s; g=h
s:3 h:8 | F.pad(x, (0, 0, 1, 0)) | 4 h; s: padded
s:3 h:8 | aten.constant_pad_nd(x, [1, 0], 2.0) | s~ 9; h: padded
s:3 h:8 | aten.reflection_pad1d(x, [1, 0]), aten.replication_pad1d(x, [1, 0]) | s 9; h: padded
b:2 c:8 y:5 | F.pad(x, (1, 0), mode="circular"), F.pad(x, (1, 0), mode="reflect") | b c 6; y: padded
s:3 h:8 | x.roll(1, 0), x.flip(1) | 3 h, s 8; s h: its positions are rolled or flipped
s:3 h:8 | x.tril(), x.triu() | s h; s h: cut to a triangle
s:3 h:8 d:8 | x.diagonal(0, 1, 2) | s 8; h d: its diagonal is taken
s:3 h:8 p:2 | torch.view_as_complex(x), torch.view_as_real(torch.view_as_complex(x)) | s h, s h 2; p: real and
    imaginary part
s:3 h:8, t:3 g:8 | aten.copy(x, y) | s h; t=s; g=h
"""

PRODUCTS = """
s:3 h:8, w f:5 g:8, w e:5 | F.linear(x, y, z) | s~ f; g=h; e=f
s:3 h:8, w f:5 g:8 | F.linear(x, y) | s f; g=h
s:3 h:8, w f:5 g:8 | F.linear(x.exp(), y) | s~ f; g=h
s:3 h:8, w g:8 f:5 | x @ y, x.mm(y) | s f; g=h
b:2 s:3 h:8, c:2 g:8 f:5 | x @ y, x.bmm(y) | b s f; c=b; g=h
s:3 h:8, g:8 | x.mv(y) | s; g=h
h:8, g:8 | x.dot(y) | scalar; g=h
w e:5, s:3 h:8, w g:8 f:5 | torch.addmm(x, y, z) | s~ e; g=h; f=e
w e:5, b:2 s:3 h:8, c:2 g:8 f:5 | torch.baddbmm(x, y, z) | b~ s~ e; c=b; g=h; f=e
s:3 h:8, t:5 g:8 | torch.einsum("sh,th->st", x, y) | s t; g=h
s:3 h:8 | torch.einsum("sh->h", x) | 8; s h: no rule for einsum sh->h
b:2 n:4 s:3 q:6, c:2 m:4 t:5 k:6, d:2 l:4 u:5 v:7 | F.scaled_dot_product_attention(x, y, z) | b n s~ v; q: the
    attention scale follows its size; c=b; m=n; t: attended positions; k=q; d=b; l=n; u=t
n:4 s:3 q:6, m:2 t:5 k:6, l:2 u:5 v:7 | F.scaled_dot_product_attention(x, y, z, scale=1.0, enable_gqa=True) |
    (n0*n1~) s~ v; m=n0; t: attended positions; k=q; l=n0; u=t
b:2 c:8 y:5, w f:6 d:8 z:3, w e:6 | F.conv1d(x, y, z) | b~ f 3; y z: positions of a convolution; d=c; e=f
b:2 c:8 y:5 x:5, w f:8 o:1 z:3 w:3 | F.conv2d(x, y, groups=8) | b c 3 3; y x z w: positions of a convolution; f=c
b:2 c:8 y:5 x:5 t:5, w f:6 d:4 z:1 w:1 u:1 | F.conv3d(x, y, groups=2) | b (c0*f1) 5 5 5; c0: numbers the groups of
    a convolution; y x t: positions of a convolution; f0=c0; d=c1
s:16 h:16, w e:4 g:16 f:16, i o:4 | aten._grouped_mm(x.bfloat16(), y.bfloat16(), z.int()) | s f; e routed: tokens
    are routed over it; g=h; o=e
"""

SUMS_AND_NORMS = """
s:3 h:8 | x.sum(1), x.nansum(1), aten.norm(x, 2, [1]), aten.frobenius_norm(x, [1]) | s
s:3 h:8 | torch.linalg.vector_norm(x, dim=1, keepdim=True) | s 1
s:3 h:8 | x.exp().sum(1) | s~; h: summed over where a masked unit need not vanish
s:3 h:8 | x.mean(1), x.nanmean(1), x.var(1), x.std(1), *torch.var_mean(x, 1), *torch.std_mean(x, 1) | s; h normed:
    averaged over
b:2 c:8 y:6 | F.adaptive_avg_pool1d(x, 2), F.avg_pool1d(x, 3), F.max_pool1d(x, 3) | b c 2; y: positions are pooled
b:2 c:8 y:6 z:6 | F.adaptive_avg_pool2d(x, 2), F.avg_pool2d(x, 3), F.max_pool2d(x, 3) | b c 2 2; y z: positions
    are pooled
b:2 c:8 y:6 z:6 | aten._adaptive_avg_pool2d(x, [2, 2]) | b c 2 2; y z: positions are pooled
s:3 h:8 | x.amax(1), x.amin(1), x.any(1), x.all(1), x.argmax(1), x.argmin(1), x.prod(1), x.logsumexp(1) | s~; h
    routed: its units are compared or counted (amax)
s:3 h:8 | *x.max(1), *x.min(1), *x.median(1) | s~; h routed: its units are compared or counted (max)
s:3 h:8 | x.topk(2) | s~ 2; h routed: its units are compared or counted (topk)
s:3 h:8 | *x.sort(), x.argsort() | s~ 8; h routed: its units are compared or counted (sort)
s:3 h:8 | x.cumsum(1), x.cumprod(1), x.cummax(1)[0], x.logcumsumexp(1) | s~ h~; h routed: its units are compared
    or counted (cumsum)
s:3 h:8 | x.softmax(1), aten._safe_softmax(x, 1), aten._softmax(x, 1, False) | s~ h~; h routed: normalised by a
    softmax
s:3 h:8 | x.log_softmax(1), aten._log_softmax(x, 1, False) | s~ h~; h routed: normalised by a softmax
s:3 h:8, w g:8, w f:8 | F.layer_norm(x, (8,), y, z) | s~ h; h normed: normalised by layer_norm; g=h; f=h
s:3 h:8, w g:8, w f:8 | torch.native_layer_norm(x, (8,), y, z, 1e-5) | s~ h, 3 1, 3 1; h normed: normalised by
    native_layer_norm; g=h; f=h
s:3 h:8, w g:8 | F.rms_norm(x, (8,), y) | s h; h normed: normalised by rms_norm; g=h
s:3 h:8, w g:8 | aten._fused_rms_norm(x, [8], y, 1e-5) | s h, 3 1; h normed: normalised by _fused_rms_norm; g=h
b:2 c:8 y:5, w g:8, w f:8, w e:8, w d:8 | F.batch_norm(x, y, z, u, v) | b~ c y~; g=c; f=c; e=c; d=c
b:2 c:8 y:5, w g:8, w f:8, w e:8, w d:8 | aten.native_batch_norm(x, y, z, u, v, False, 0.1, 1e-5) | b~ c y~, 0, 0;
    g=c; f=c; e=c; d=c
b:2 c:8 y:5, w g:8, w f:8, w e:8, w d:8 | aten._native_batch_norm_legit_no_training(x, y, z, u, v, 0.1, 1e-5) | b~
    c y~, 0, 0; g=c; f=c; e=c; d=c
b:2 c:8 y:5, w g:8, w f:8 | F.group_norm(x, 2, y, z) | b~ c y~; c normed: normalised by group_norm; y: normalised
    over positions; g=c; f=c
b:2 c:8 y:5, w g:8, w f:8 | aten.native_group_norm(x, y, z, 2, 8, 5, 2, 1e-5) | b~ c y~, 2 2, 2 2; c normed:
    normalised by native_group_norm; y: normalised over positions; g=c; f=c
b:2 c:8 y:5, w g:8, w f:8 | F.instance_norm(x, weight=y, bias=z) | b~ c y~; c normed: normalised by instance_norm;
    y: normalised over positions; g=c; f=c
"""

LOOK_UPS_AND_CONSTANTS = """
w v:9 h:8, i s:3 | F.embedding(y, x) | s~ h; v token: looked up by index
s:3 h:8, i t:3 | x[y] | t~ h; s: looked up by index
w e:4 h:8, s:3 f:4 | x[y.argmax(1)] | s~ h; e routed: its units are compared or counted (argmax); f=e
s:3 h:8, m t:3 | x[y] | 7919 h; s: looked up by index
s:3 h:8 | x[:, torch.tensor([1, 2, 3])] | s h0
s:3 h:8 | x[:, torch.tensor([3, 1])] | s 2; h: looked up by index
s:3 h:8 | x[torch.tensor(True)] | 1 s h
s:3 h:8, i t:3 | x.index_select(0, y) | 3 h; s: looked up by index
s:3 h:8, i t:3 k:2 | x.gather(1, y) | s 2; h: looked up by index; t=s
s:3 h:8 | x.gather(1, x.topk(2)[1]) | s 2; h routed: its units are compared or counted (topk)
s:3 h:8, i t:3 k:2 | x.take_along_dim(y, 1) | s k~; h: looked up by index; t=s
b:2 s:3 h:8, i o:1 t:3 k:2 | x.take_along_dim(y, 2) | b s k~; h: looked up by index; t=s
b:2 o:1 h:8, i c:2 t:3 k:2 | x.take_along_dim(y, 2) | b t~ k~; h: looked up by index; c=b
s:3 h:8 | x.take_along_dim(x.topk(2)[1], 1) | s 2; h routed: its units are compared or counted (topk)
s:3 h:8, i k:2 | x.take_along_dim(y) | 2; s h k: the rule for aten.take_along_dim does not cover these arguments
s:3 h:8, i t:3 k:8, u:3 l:8 | x.scatter(1, y, z), x.scatter_add(1, y, z), x.scatter_reduce(1, y, z, "sum") | s h~;
    h k l: written by index; t=s; u=s
s:3 h:8 | torch.zeros(3, 8).scatter(1, x.topk(2)[1], 1.0) | s~ h~; h routed: its units are compared or counted
    (topk); h: written by index
s:3 h:8, i t:3, u:3 l:8 | x.index_add(0, y, z), x.index_copy(0, y, z) | s~ h; s u: written by index; l=h
s:3 h:8, i t:2, l:8 | x.index_put((y,), z), aten._unsafe_index_put(x, [y], z) | s h; s: written by index; l=h
s:3 h:8 | torch.zeros(3, 8).copy_(x) | s h
h:8 | x + torch.zeros(8), x + torch.ones(8), x + torch.full((8,), 2.0), x + torch.empty(8) | h, h~, h~, h~
h:8 | x + x.new_zeros(8), x + x.new_ones(8), x + x.new_full((8,), 2.0), x + x.new_empty(8) | h, h~, h~, h~
h:8 | x + torch.empty_strided((8,), (1,)), x + torch.empty_permuted((8,), (0,)), x + torch.scalar_tensor(1.0) | h~
h:8 | torch.zeros_like(x), torch.ones_like(x), torch.full_like(x, 2.0), torch.empty_like(x), aten.zero(x) | h, h~,
    h~, h~, h
h:8 | x * torch.arange(8) | h; h: its units are numbered by aten.arange
h:8 | x * torch.linspace(0, 1, 8) | h; h: its units are numbered by aten.linspace
h:8 | x * torch.logspace(0, 1, 8), x * torch.eye(8), x * torch.rand(8), x * torch.randn(8) | h, 8 h, h, h; h: its
    units are numbered by aten.randn
h:8 | x * torch.tril_indices(8, 1)[0], x * torch.triu_indices(1, 8)[0] | h; h: its units are numbered by
    aten.triu_indices
h:8 | x * torch.hann_window(8), x * torch.randint(9, (8,)), x * torch.rand_like(x), x * torch.randn_like(x) | h;
    h: its units are numbered by aten.randn_like
i s:3 | F.one_hot(x, 4) | s~ 4
s:3 h:8 | F.one_hot(x.argmax(1), 8) | s~ h; h routed: its units are compared or counted (argmax)
s:3 h:8 | torch.histc(x, 4), torch.bincount(x.argmax(1), minlength=8) | 4, 7919; s h routed: positions are chosen
    by data (histc)
s:3 h:8, m t:3 g:8 | x.nonzero(), x.masked_select(y), torch.nonzero_static(x, size=3) | 7919 2, 7919, 3 2; s h
    routed: positions are chosen by data (nonzero); t g routed: positions are chosen by data (masked_select)
s:9, t:5 | torch.searchsorted(x, y), torch.bucketize(y, x) | 5; s t routed: positions are chosen by data
    (searchsorted)
s:3 h:8 | torch.unique(x), torch.unique_consecutive(x), torch.unique(x, dim=0) | 7919, 7919, 7919 8; s h routed:
    positions are chosen by data (_unique2)
o:1 | torch.full((2,), x.item()) | 2=
s:3 h:8, m t:3 | torch.zeros(x[y].shape[0]) | 7919=; s: looked up by index
"""

ALIASES = (
    "_to_copy lift_fresh type_as native_dropout feature_dropout alpha_dropout cpu cuda _reshape_alias unsafe_chunk "
    "concat concatenate grouped_mm nonzero_numpy _local_scalar_dense _assert_async"
)
"""Operations without a row that share the rule of one with a row."""

ROWS = [
    row
    for table in (ELEMENTWISE, SHAPES, PRODUCTS, SUMS_AND_NORMS, LOOK_UPS_AND_CONSTANTS)
    for row in table.replace("\n    ", " ").strip().splitlines()
]


@pytest.mark.parametrize("row", ROWS)
def test_rule(row):
    assert traced(row)[0] == row.split(" | ")[2]


def test_every_rule_has_a_row():
    covered = {name for row in ROWS for name in traced(row)[1] if name in RULES}
    assert sorted(set(RULES) - covered) == sorted(ALIASES.split())
    assert {RULES[name] for name in ALIASES.split()} <= {RULES[name] for name in covered}


class Call(nn.Module):
    def __init__(self, text):
        super().__init__()
        aten = torch.ops.aten
        each = lambda names, *tensors: [getattr(aten, name)(*tensors) for name in names.split()]  # noqa: E731
        scope = {**globals(), "F": nn.functional, "aten": aten, "each": each}
        self.call = eval(f"lambda x=None, y=None, z=None, u=None, v=None: [{text}]", scope)

    def forward(self, *tensors):
        return self.call(*tensors)


class Placed(Propagation):
    """Every argument is an activation with free axes, or a weight; constants stay as they are."""

    def __init__(self, program, arguments):
        self.arguments, self.placed = iter(arguments), []
        super().__init__(program, nn.Module())

    def _inputs(self, program):
        values = super()._inputs(program)
        for i, spec in enumerate(program.graph_signature.input_specs):
            if spec.kind == InputKind.USER_INPUT:
                kind, axes = next(self.arguments)
                dims = tuple(fresh(size, zero=True) for size in axes.values())
                weight = {"weight": spec.arg.name, "order": tuple(range(len(dims)))} if kind == "w" else {}
                values[i] = replace(values[i], dims=dims, tag="", data=kind != "w", **weight)
                self.placed.append(values[i])
        return values


def parsed(text):
    """The kind of an argument (`w`, `i`, `m` or empty), and the sizes of its axes."""
    words = text.split()
    kind = words.pop(0) if ":" not in words[0] else ""
    return kind, {letter: int(size) for letter, size in (word.split(":") for word in words)}


@cache
def traced(row):
    """The results of a row as the table writes them, and the operations in its graph."""
    arguments, call, _ = row.split(" | ")
    arguments = [parsed(text) for text in arguments.split(", ")]
    dtypes = {"i": torch.int64, "m": torch.bool}
    tensors = tuple(torch.ones(tuple(axes.values()), dtype=dtypes.get(kind)) for kind, axes in arguments)
    program = torch.export.export(Call(call), tensors, strict=False)
    done = Placed(program, arguments)
    names, notes = {}, {}
    for (_, axes), value in zip(arguments, done.placed, strict=True):
        for letter, dim in zip(axes, value.dims, strict=True):
            parts = list(leaves(dim))
            for i, leaf in enumerate(parts):
                name = f"{letter}{i}" if len(parts) > 1 else letter
                if names.setdefault(id(leaf.atom), name) != name:
                    notes[f"{name}={names[id(leaf.atom)]}"] = []
                    continue
                for how, why in leaf.atom.marks.items():
                    notes.setdefault(f"{how}: {why}".removeprefix("frozen"), []).append(name)
    results = [" ".join(shown(dim, names) for dim in value.dims) or "scalar" for value in done.outputs]
    results = results[:1] if len(set(results)) == 1 else results
    noted = [f"{' '.join(letters)} {note}".replace(" :", ":").strip() for note, letters in notes.items()]
    return "; ".join([", ".join(results), *noted]), {plain_name(node) for node in program.graph.nodes}


def shown(dim, names):
    factors = []
    for f in expand(dim):
        known = names.get(id(f.atom))
        if f.atom.form == "sum":
            known = f"({'+'.join(shown(term, names) for term in f.atom.parts)})"
        factors.append(f"{f.atom.size}{'=' * f.const}" if known is None else known + "~" * (not f.zero))
    return f"({'*'.join(factors)})" if len(factors) > 1 else (factors or ["1"])[0]
