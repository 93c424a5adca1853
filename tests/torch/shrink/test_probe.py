"""Opening tries removal on a copy: what breaks the forward pass or a reload is frozen, with the reason."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from secateur import criteria
from secateur.check import verify
from secateur.errors import PlanError
from secateur.layout import Layout
from secateur.pruning import prune
from secateur.select import Unit
from secateur.torch.base.expected_errors import in_a_line
from secateur.torch.host import TorchHost
from secateur.torch.shrink.probe import derive, probe
from secateur.torch.trace.derive import trace
from tests.torch.exact import randomize
from tests.zoo import structure


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


def test_experts_of_a_grouped_product_keep_multiples_and_the_plan_says_so():
    model, example = structure("mixtral")
    host = TorchHost(randomize(model), example)
    assert [(a.name, a.multiple) for a in host.layout.axes.values() if a.multiple > 1] == [
        ("hidden", 8),
        ("L0.ffn", 8),
        ("L1.ffn", 8),
    ]
    assert Layout.from_text(str(host.layout)) == host.layout
    plan = prune(host, criteria.magnitude, Unit("ffn"), 0.4)  # 0.6 * 48 = 28.8 units
    assert [len(units) for units in plan.keep.values()] == [32, 32]
    assert plan.provenance["multiples"] == {"8": ["L0.ffn", "L1.ffn"]}
    assert verify(host, plan, [example]).difference <= 1e-5
    with pytest.raises(PlanError, match=r"L0.ffn: 9 of 48 units would remain.*a multiple of 8; keep 8"):
        host.layout.check_keep({"L0.ffn": np.arange(9)})


def test_a_model_that_does_not_run_as_a_copy_is_left_as_traced_with_a_warning(caplog):
    class Once(Stubborn):
        def __deepcopy__(self, memo):
            raise RuntimeError("one of a kind\nand more")

    model, example = Once(), (torch.rand(3, 6),)
    with caplog.at_level(logging.WARNING, logger="secateur"):
        assert probe(model, traced := trace(model, example), example) is traced
    assert "Once, which does not run as a copy (" in caplog.text
    assert "RuntimeError: one of a kind)" in caplog.text


def test_an_error_in_a_line():
    assert in_a_line(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert in_a_line(KeyError()) == "KeyError"
    long = in_a_line(RuntimeError("x" * 500))
    assert len(long) == 160
    assert long.endswith("...")


def test_a_large_model_with_a_mask_is_tried_out_without_numbers(monkeypatch, caplog):
    """transformers asks whether a mask is all ones, which no tensor without numbers can say."""
    monkeypatch.setattr("secateur.torch.shrink.probe.SMALL", 0)
    model, example = structure("phi3")
    assert "attention_mask" in example
    derived = derive(model, example)
    assert "was not tried out" not in caplog.text
    assert "prune them alike" in derived.axis("L0.v").frozen
