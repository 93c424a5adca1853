"""Opening tries removal on a copy: what breaks the forward pass or a reload is frozen, with the reason."""

import torch
from torch import nn

from secateur.torch.probe import derive, probe
from secateur.torch.trace import trace


class Stubborn(nn.Module):
    """An FFN whose width the forward pass computes from another size, beside one that can go."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.free, self.back = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        inner = torch.relu(self.up(x)).reshape(*x.shape[:-1], 4 * x.shape[-1])
        return self.down(inner) + self.back(torch.relu(self.free(x)))


def test_a_width_that_the_forward_pass_computes_is_frozen():
    torch.manual_seed(0)
    model = Stubborn()
    before = {name: p.clone() for name, p in model.named_parameters()}
    example = (torch.rand(3, 6),)
    traced, derived = trace(model, example), derive(model, example)
    stubborn = next(a.name for a in traced.axes.values() if a.size == 24)
    free = next(a.name for a in traced.axes.values() if a.size == 20)
    assert traced.axes[stubborn].frozen is None
    assert "does not run when units are removed" in derived.axes[stubborn].frozen
    assert derived.axes[free].frozen is None
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_heads_of_torch_attention_are_frozen_with_a_reason():
    model = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    layout = derive(model, (torch.rand(2, 5, 16),))
    heads = layout.of_kind("head", prunable=False)
    assert heads
    assert all(axis.frozen for axis in heads)
    assert [axis.frozen for axis in layout.axes.values() if axis.size == 24] == [None]


def test_modules_that_the_forward_pass_rebuilds_are_frozen():
    from transformers import BigBirdConfig, BigBirdModel

    torch.manual_seed(0)
    config = BigBirdConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30
    )
    model = BigBirdModel(config).eval()
    example = {"input_ids": torch.randint(30, (2, 13))}
    model(**example)  # too short for sparse blocks: the model puts another attention in their place
    layout = probe(model, trace(model, example), example)
    (head,) = layout.of_kind("head", prunable=False)
    assert "a reload builds BigBirdBlockSparseAttention" in head.frozen
    assert [axis.size for axis in layout.of_kind("ffn")] == [24]
