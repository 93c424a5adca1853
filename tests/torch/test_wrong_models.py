"""Models made wrong on purpose: `verify`, the check of a reloaded folder, and the parity of a program refuse each."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.arrays import to_numpy
from secateur.check import VerifyError
from secateur.deploy.jobs import parity
from secateur.deploy.target import DeployError
from secateur.deploy.targets.inputs import named_outputs
from secateur.errors import ModelError
from secateur.jobs.prune_model import reloaded
from secateur.layout import Layout
from secateur.torch.host import TorchHost
from tests import zoo


class Mistaken(TorchHost):
    """A host whose removal makes one more change to the model."""

    damage: Any = staticmethod(lambda model: None)

    def resize(self, plan):
        super().resize(plan)
        with torch.no_grad():
            self.damage(self.model)


def mistaken(host, damage):
    host = host.copy()
    host.__class__, host.damage = Mistaken, damage
    return host


# -- mistakes in a decoder and in an encoder --------------------------------------------------------------------------


def layers_swapped(model):
    a, b = model.model.layers
    for one, other in zip(a.mlp.parameters(), b.mlp.parameters(), strict=True):
        one.copy_(other)


def layers_in_other_order(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number


def head_of_another(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.copy_(attention.q_proj.weight.roll(attention.head_dim, 0))


def key_head_of_another(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight.copy_(attention.k_proj.weight.roll(attention.head_dim, 0))


def neuron_of_another(model):
    down = model.model.layers[1].mlp.down_proj.weight
    down[:, 3] = down[:, 4]


def tie_broken(model):
    own = model.lm_head.weight.clone()
    own[7] += 0.01
    model.lm_head.weight = nn.Parameter(own)
    model.config.tie_word_embeddings = False


def rotary_halves_swapped(model):
    attention = model.model.layers[0].self_attn
    heads = attention.q_proj.weight.view(-1, 2, attention.head_dim // 2, attention.q_proj.in_features)
    heads.copy_(heads.flip(1))


def not_a_number(model):
    model.model.layers[0].mlp.up_proj.weight[1, 2] = float("nan")


def norm_scaled(model):
    model.model.layers[1].input_layernorm.weight.mul_(1.001)


def bias_lost(model):
    model.bert.encoder.layer[1].attention.self.value.bias.zero_()


def layer_norm_bias_lost(model):
    model.bert.encoder.layer[0].output.LayerNorm.bias.zero_()


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.1, training=True)


def dropout_left_on(model):
    model.bert.encoder.layer[0].output.dropout = AlwaysDrops()


OF_A_DECODER = (
    layers_swapped,
    layers_in_other_order,
    head_of_another,
    key_head_of_another,
    neuron_of_another,
    tie_broken,
    rotary_halves_swapped,
    not_a_number,
    norm_scaled,
)
OF_AN_ENCODER = (bias_lost, layer_norm_bias_lost, dropout_left_on)
MISTAKES = [("llama", damage) for damage in OF_A_DECODER] + [("bert", damage) for damage in OF_AN_ENCODER]
EACH = pytest.mark.parametrize(("family", "damage"), MISTAKES, ids=[damage.__name__ for _, damage in MISTAKES])


@cache
def opened(family):
    host = secateur.open(zoo.build(family, num_hidden_layers=2))
    keep = {}
    for axis in host.layout.axes.values():
        if axis.kind == "ffn":
            keep[axis.name] = np.arange(5, axis.size)
        elif axis.kind in (("kv",) if family == "llama" else ("head",)):
            keep[axis.name] = np.arange(axis.size // 2, axis.size)
    return host, secateur.Plan(keep), zoo.inputs(host.model)


@EACH
def test_verify_refuses(family, damage):
    host, plan, batch = opened(family)
    with pytest.raises(VerifyError, match=r"outputs differ by .* at logits\[|the shrunk model gives NaN"):
        secateur.verify(mistaken(host, damage), plan, [batch])


@EACH
def test_the_check_of_a_reloaded_folder_refuses(family, damage, tmp_path):
    if damage is dropout_left_on:
        pytest.skip("no folder holds the modules of dropout")
    host, plan, batch = opened(family)
    small, wrong = host.copy(), mistaken(host, damage)
    for other in (small, wrong):
        other.resize(plan)
        other.save(tmp_path / type(other).__name__)
    with pytest.raises(ModelError, match="differs from the saved one by"):
        reloaded(None, small, tmp_path / "Mistaken", [batch], [])


@EACH
def test_parity_refuses(family, damage):
    host, plan, batch = opened(family)
    small, wrong = host.copy(), mistaken(host, damage)
    for other in (small, wrong):
        other.resize(plan)
    assert parity.compare(small.model, program(small.copy().model), [batch], 0.0).relative_error == 0.0
    with pytest.raises(DeployError, match="differs from PyTorch by .* of its logits"):
        parity.compare(small.model, program(wrong.model), [batch], 1e-4)


def test_the_same_models_pass_without_a_mistake():
    for family in ("llama", "bert"):
        host, plan, batch = opened(family)
        assert secateur.verify(mistaken(host, Mistaken.damage), plan, [batch]).difference <= 1e-6


def program(model):
    """What an exported program is to parity: names to arrays."""

    def run(feed):
        with torch.no_grad():
            outputs = named_outputs(model, {name: torch.from_numpy(value) for name, value in feed.items()})
        return {name: to_numpy(value) for name, value in outputs.items()}

    return run


# -- outputs in every form --------------------------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Any
    hidden: Any = None


class Odd(nn.Module):
    """Two linear layers; `form` makes the outputs of four numbers a row."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.form, self.up, self.down = form, nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.form(self.down(self.up(x).relu()))


LAYOUT = """
axes
  L0.ffn 12 ffn
parameters
  up.weight   : L0.ffn 6 < x0 1
  up.bias     : L0.ffn
  down.weight : 4 L0.ffn < x1 1
  down.bias   : 4
"""


def filled(fill, columns=1):
    def form(y):
        return torch.cat([torch.full_like(y[:, :columns], fill), y[:, columns:]], 1)

    return form


class Record:
    def __init__(self, logits):
        self.logits = logits


FORMS = {
    "dataclass": lambda y: Answer(y),
    "dataclass in a tuple": lambda y: (torch.zeros(1), [Answer(torch.zeros(2), {"deep": y})]),
    "object": Record,
    "integers": lambda y: (y * 1000).round().long(),
    "integers beside a constant": lambda y: (torch.ones(3), {"ids": (y * 1000).round().int()}),
    "booleans": lambda y: y > 1.5,
    "complex": lambda y: torch.complex(torch.ones_like(y), y),
    "conjugated": lambda y: torch.complex(torch.ones_like(y), y).conj(),
    "infinite": lambda y: torch.where(y > 1.5, torch.inf, y),
    "infinite throughout": lambda y: torch.where(y > 1.5, torch.inf, -torch.inf),
    "beside infinity": filled(-torch.inf),
    "beside -1e9": filled(-1e9),
    "beside many -1e9": filled(-1e9, 3),
    "beside many -65504": filled(-65504.0, 3),
    "beside the lowest number": filled(torch.finfo(torch.float32).min),
    "small beside large": lambda y: (y * 1e-6, torch.full((3,), 1e6)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_wrong_number_is_found_in_outputs_of_every_form(form):
    def damage(model):
        model.down.bias[3] += 2

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    host = secateur.open(Odd(form), (x,), layout=Layout.from_text(LAYOUT))
    plan = secateur.Plan({"L0.ffn": np.array([0, 2, 3, 7, 8])})
    assert secateur.verify(mistaken(host, Mistaken.damage), plan, [(x,)]).difference <= 1e-6
    with pytest.raises(VerifyError, match="outputs differ by"):
        secateur.verify(mistaken(host, damage), plan, [(x,)])
    with torch.no_grad():
        damage(wrong := Odd(form))
    with pytest.raises(DeployError, match="differs from PyTorch by"):
        parity.compare(Named(Odd(form)), program(Named(wrong)), [{"x": x}], 1e-4)


class Named(nn.Module):
    """A model that is called by names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_a_model_without_numbers_is_refused():
    x = torch.ones(5, 6)
    host = secateur.open(Odd(lambda y: ("text", None)), (x,), layout=Layout.from_text(LAYOUT))
    with pytest.raises(VerifyError, match="no numbers that could be compared"):
        secateur.verify(host, secateur.Plan({"L0.ffn": np.arange(5)}), [(x,)])


def test_nan_of_the_reference_is_no_agreement():
    x = torch.ones(5, 6)
    some = torch.zeros(5, 4).bool()
    some[2, 1] = True
    nan, right = Odd(lambda y: y.masked_fill(some, torch.nan)), Odd(lambda y: y)
    with pytest.raises(DeployError, match="differs from PyTorch by inf of its output"):
        parity.compare(nan, program(right), [{"x": x}], 1e-4)
    with pytest.raises(DeployError, match="differs from PyTorch by inf of its output"):
        parity.compare(right, program(nan), [{"x": x}], 1e-4)
    assert parity.compare(nan, program(nan), [{"x": x}], 1e-4).relative_error == 0.0
    every = Odd(lambda y: y * torch.nan)
    with pytest.raises(DeployError, match="NaN proves nothing"):
        parity.compare(every, program(every), [{"x": x}], 1e-4)


def test_other_outputs_of_a_program_are_refused():
    x = torch.ones(5, 6)
    one, two = Odd(lambda y: {"y": y}), Odd(lambda y: {"y": y, "z": y})
    for model, other in ((one, two), (two, one)):
        with pytest.raises(DeployError, match="the program gives z as"):
            parity.compare(model, program(other), [{"x": x}], 1e-4)
