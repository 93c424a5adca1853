"""Attention with one projection for queries, keys and values, as timm and nanoGPT write it: heads go where the forward
pass takes sizes from the weights or from attributes, and elsewhere the reason names its line."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import criteria
from secateur.check import verify
from secateur.pruning import prune
from secateur.select import Unit
from secateur.torch.host import TorchHost


class Timm(nn.Module):
    """One reshape to five dimensions, and unbind."""

    def __init__(self, style):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.style = 4, 8, 32, style
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if self.style == "fixed":
            return self.proj(x.reshape(B, N, C))
        return self.proj(x.reshape(B, N, self.attn_dim if self.style == "attribute" else -1))


class NanoGPT(nn.Module):
    """A split by the width of all heads, and views by the number of heads."""

    def __init__(self, style):
        super().__init__()
        self.n_head, self.n_embd, self.style = 4, 32, style
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        B, T, C = x.size()
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        if self.style == "fixed":
            q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts)
        else:
            q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()
        return self.c_proj(y.view(B, T, C if self.style == "fixed" else -1))


class Torch(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Net(nn.Module):
    def __init__(self, attention, style):
        super().__init__()
        self.stem, self.norm, self.attn, self.head = (
            nn.Linear(6, 32),
            nn.LayerNorm(32),
            attention(style),
            nn.Linear(32, 5),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.attn(self.norm(x)))


def opened(attention, style):
    torch.manual_seed(0)
    return TorchHost(Net(attention, style).eval(), (torch.randn(3, 7, 6),))


@pytest.mark.parametrize(("attention", "style"), [(Timm, "attribute"), (Timm, "free"), (NanoGPT, "free")])
def test_heads_of_a_fused_projection_are_removed(attention, style):
    host = opened(attention, style)
    plan = prune(host, criteria.magnitude, Unit("head"), 0.5)
    assert verify(host, plan, [host.example, (torch.randn(2, 5, 6),)]).difference <= 1e-5
    host.resize(plan)
    attn = host.model.attn
    fused = attn.qkv if attention is Timm else attn.c_attn
    assert (fused.out_features, host.model.norm.normalized_shape) == (48, (32,))
    sizes = (attn.num_heads, attn.head_dim) if attention is Timm else (attn.n_head, attn.n_embd)
    assert sizes == ((2, 8) if attention is Timm else (2, 16))
    assert host.model(torch.randn(2, 9, 6)).shape == (2, 9, 5)


@pytest.mark.parametrize(
    ("attention", "code"),
    [
        (Timm, "return self.proj(x.reshape(B, N, C))"),
        (NanoGPT, "q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts)"),
    ],
)
def test_a_size_from_the_input_is_named_with_its_line(attention, code):
    (axis,) = opened(attention, "fixed").layout.of_kind("head", prunable=False)
    assert "does not run when units are removed (RuntimeError: shape" in axis.frozen
    assert " at test_fused.py:" in axis.frozen
    assert f", {code})" in axis.frozen
    assert axis.frozen.endswith("write -1 for the size that units have there")


def test_heads_of_torch_attention_say_what_to_do():
    (axis,) = opened(Torch, "").layout.of_kind("head", prunable=False)
    assert "insists that its heads fill the hidden width" in axis.frozen
    assert "write the attention with separate projections" in axis.frozen
