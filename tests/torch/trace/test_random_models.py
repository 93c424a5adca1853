"""Random small Transformers: on every axis that the derived layout calls prunable, masking equals removing."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.check import verify
from secateur.plan import Plan
from secateur.torch.host import TorchHost
from secateur.torch.shrink.resize import resize
from secateur.torch.trace.derive import trace
from tests.torch.exact import choose, difference, mask, outputs, randomize

VOCAB = 11


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.num_heads, self.num_kv_heads = c["kv"] * c["group"], c["kv"]
        self.head_dim = c["dim"]
        self.q_size, self.kv_size = self.num_heads * c["dim"], c["kv"] * c["dim"]
        width = self.q_size + 2 * self.kv_size
        if c["fused"]:
            self.qkv = nn.Linear(c["hidden"], width, bias=c["bias"])
        else:
            self.q = nn.Linear(c["hidden"], self.q_size, bias=c["bias"])
            self.k = nn.Linear(c["hidden"], self.kv_size, bias=c["bias"])
            self.v = nn.Linear(c["hidden"], self.kv_size, bias=c["bias"])
        self.o = nn.Linear(self.q_size, c["hidden"], bias=c["bias"])
        self.scale = c["dim"] ** -0.5

    def forward(self, x):
        b, s, _ = x.shape
        if self.c["fused"]:
            q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(b, s, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (t.view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2) for t in (k, v))
        if self.c["rotary"]:
            q, k = turn(q), turn(k)
        groups = q.shape[1] // k.shape[1]
        if self.c["kernel"] == "gqa":
            y = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=groups > 1
            )
        else:
            k, v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
            y = ((q @ k.transpose(-1, -2)) * self.scale).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, s, -1))


def turn(x):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * torch.full((half,), 0.3)
    cos, sin = (torch.cat([t, t], dim=-1) for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, width = c, c["ffn"] * (2 if c["gated"] == "fused" else 1)
        self.up = nn.Linear(c["hidden"], width, bias=c["bias"])
        if c["gated"] == "separate":
            self.gate = nn.Linear(c["hidden"], c["ffn"], bias=c["bias"])
        self.down = nn.Linear(c["ffn"], c["hidden"], bias=c["bias"])

    def forward(self, x):
        y = self.up(x)
        if self.c["gated"] == "fused":
            gate, y = y.chunk(2, dim=-1)
            return self.down(nn.functional.silu(gate) * y)
        if self.c["gated"] == "separate":
            return self.down(self.gate(x).sigmoid() * y)
        return self.down(getattr(nn.functional, self.c["act"])(y))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        norm = nn.LayerNorm if c["norm"] == "layer" else nn.RMSNorm
        self.c = c
        self.one, self.two = norm(c["hidden"]), norm(c["hidden"])
        self.attention, self.ffn = Attention(c), FeedForward(c)

    def forward(self, x):
        if self.c["place"] == "parallel":
            y = self.one(x)
            return x + self.attention(y) + self.ffn(y)
        if self.c["place"] == "post":
            x = self.one(x + self.attention(x))
            return self.two(x + self.ffn(x))
        x = x + self.attention(self.one(x))
        return x + self.ffn(self.two(x))


class Small(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, c["hidden"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.head = nn.Linear(c["hidden"], VOCAB, bias=False)
        if c["tied"]:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


CONFIGS = st.fixed_dictionaries(
    {
        "kv": st.integers(1, 3),
        "group": st.integers(1, 3),
        "dim": st.sampled_from([2, 4, 6]),
        "ffn": st.integers(5, 9),
        "hidden": st.sampled_from([6, 8, 10]),
        "layers": st.integers(1, 2),
        "fused": st.booleans(),
        "bias": st.booleans(),
        "rotary": st.booleans(),
        "kernel": st.sampled_from(["gqa", "eager"]),
        "gated": st.sampled_from(["no", "fused", "separate"]),
        "act": st.sampled_from(["gelu", "relu", "sigmoid", "softplus"]),
        "norm": st.sampled_from(["layer", "rms"]),
        "place": st.sampled_from(["pre", "post", "parallel"]),
        "tied": st.booleans(),
    }
)


def masking_equals_removing(c):
    torch.manual_seed(0)
    model = randomize(Small(c))
    example = (torch.randint(VOCAB, (2, 5)),)
    layout = trace(model, example)
    heads = c["kv"] * c["group"]
    kinds = [a.kind for a in layout.axes.values() if not a.frozen]
    assert kinds.count("ffn") == c["layers"]
    assert kinds.count("head") == (c["layers"] if heads > 1 else 0)
    assert kinds.count("kv") == (c["layers"] if c["kv"] > 1 and c["group"] > 1 else 0)
    for axis in layout.axes.values():
        if axis.frozen or axis.kind not in ("head", "kv", "group", "ffn") or axis.size < 2:
            continue
        keep = choose(layout, (axis.kind,), only=axis.name) or {axis.name: [0]}
        if axis.parts and len(keep[axis.name]) == axis.size:
            continue
        assert difference(model, layout, keep, example) <= 1e-5, axis
        changed = outputs(mask(model, layout, keep), example)
        assert not torch.equal(changed[0], outputs(model, example)[0])


def removal_keeps_its_contract(c):
    torch.manual_seed(0)
    example = (torch.randint(VOCAB, (2, 5)),)
    host = TorchHost(randomize(Small(c)), example)
    last = {a.kind: a for a in host.layout.axes.values() if not a.frozen and a.size > 1}
    assert {"ffn", "vocab"} <= set(last)
    assert ("layer" in last) == (c["layers"] > 1)
    for kind, axis in last.items():
        if kind == "qk":
            continue
        keep = {axis.name: half(host.layout, axis)}
        if kind == "v" and "qk" in last:  # one attribute, head_dim, mirrors both
            keep[last["qk"].name] = half(host.layout, last["qk"])
        if len(keep[axis.name]) == axis.size:
            continue
        found = verify(host, Plan(keep=keep), [example], batches=1)
        assert bool(found.inexact) == (kind == "hidden" and c["norm"] == "layer"), axis
        small = copy.deepcopy(host.model)
        resize(small, host.layout, keep)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in host.model.parameters())


def half(layout, axis):
    """Every second unit, of each group where there are groups."""
    inner = axis.size // (layout.axis(axis.parts[0]).size if axis.parts else 1)
    return np.flatnonzero(np.arange(axis.size) % inner % 2 == 0)


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@examples(3)
@given(CONFIGS)
def test_masking_equals_removing_on_every_axis(c):
    masking_equals_removing(c)


@pytest.mark.slow
@examples(2)
@given(CONFIGS)
def test_every_kind_of_removal_keeps_its_contract(c):
    removal_keeps_its_contract(c)


@pytest.mark.long
@examples(25)
@given(CONFIGS)
def test_masking_equals_removing_in_many_models(c):
    masking_equals_removing(c)


@pytest.mark.long
@examples(10)
@given(CONFIGS)
def test_removal_keeps_its_contract_in_many_models(c):
    removal_keeps_its_contract(c)
