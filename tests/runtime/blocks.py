"""What tests of blocks that run as one call share: a model of plain PyTorch, batches, and calls that are counted."""

import torch
from torch import nn

from secateur import runtime
from secateur.torch.data.example import example_for
from tests import zoo
from tests.runtime.checks import compare


def encoder(name):
    """A pruned encoder of two layers."""
    return zoo.pruned(zoo.build(name, **({"num_hidden_layers": 2} if name in ("bert", "vit") else {})))


class Block(nn.Module):
    """Norms after the sums, a mask that is added, and a tuple for an output."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=i != 1) for i in range(4))
        self.up, self.down = nn.Linear(width, 40), nn.Linear(40, width)
        self.first, self.second = nn.LayerNorm(width), nn.RMSNorm(width)

    def forward(self, x, *, seen=None, flag=False):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, 0.5 * k if flag else k, v, seen)
        x = self.first(x + self.o(attended.transpose(1, 2).flatten(2)))
        return self.second(self.down(torch.relu(self.up(x))) + x), None


class Holder(nn.Module):
    """Goes through blocks in ways that the trace does not show."""

    def __init__(self, count=3):
        super().__init__()
        self.blocks, self.way = nn.ModuleList(Block() for _ in range(count)), "all"

    def forward(self, x, seen=None, **more):
        kept = []
        for i, block in enumerate(self.blocks):
            if self.way == "early" and i == 2:
                break
            if self.way == "skip" and i == 1:
                continue
            x = block(x, seen=None if self.way == "mask" and i == 1 else seen, **more)[0]
            kept.append(x)
            if self.way == "twice" and i == 1:
                x = block(x, seen=seen)[0]
            if self.way == "between" and i == 1:
                x = x + 1
        return {"last": x, "all": kept} if self.way == "keep" else {"last": x}


def holder(way="all"):
    model = zoo.plain(Holder)
    model.way = way
    return model


def text(batch, length, hidden=()):
    ids = torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for i in hidden:
        mask[i, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def added(batch=2, length=7):
    """An input of `Holder`, with a mask that is added."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.randn(batch, 1, length, length, generator=generator)
    return {"x": torch.randn(batch, length, 24, generator=generator), "seen": seen}


def compiled(model, example=None, **options):
    example = example_for(model) if example is None else example
    return model, runtime.compile(model, **{"tokens": 32, "measure": False, **options}, example=example), example


def chained(calls, fast, model, batch):
    """How many chains a call runs; what it gives is compared."""
    before = calls["chain"]
    compare(fast, model, batch)
    return calls["chain"] - before
