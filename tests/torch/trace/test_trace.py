import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.dims import format_dims, parse_dims
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.torch.shrink.resize import resize
from secateur.torch.trace.derive import trace
from secateur.torch.trace.propagate import STRICT_RULES
from secateur.torch.trace.rules import RULES
from tests.torch import slow
from tests.torch.exact import choose, difference, mask, outputs, randomize
from tests.zoo import STRUCTURES, structure

GOLDEN = Path(__file__).parents[2] / "golden"
UNEQUAL_HEADS = {"torch_encoder": "nn.MultiheadAttention asserts that its heads fill the embedding"}


LONG = ("whisper", "mamba", "swin", "roformer")
CASES = [*(name for name in STRUCTURES if name not in LONG), *slow(*LONG)]


@pytest.fixture(scope="module")
def traced():
    made = {}

    def get(name):
        if name not in made:
            model, example = structure(name)
            made[name] = (randomize(model), example, trace(model, example))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_printed_layout(traced, name):
    """Set SECATEUR_GOLDEN=1 to write the files anew, then read the difference by eye."""
    text = str(traced(name)[2]) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("SECATEUR_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", CASES)
def test_text_round_trip(traced, name):
    layout = traced(name)[2]
    assert Layout.from_text(str(layout)) == layout
    for dims in layout.params.values():
        assert parse_dims(format_dims(dims)) == dims


@pytest.mark.parametrize("name", CASES)
def test_masking_equals_removing(traced, name):
    model, example, layout = traced(name)
    kinds = ("ffn",) if name in UNEQUAL_HEADS else ("head", "kv", "ffn")
    keep = choose(layout, kinds, multiple=4)
    assert keep
    assert difference(model, layout, keep, example) <= 1e-5
    changed = outputs(mask(model, layout, keep), example)
    assert any(not torch.equal(a, b) for a, b in zip(changed, outputs(model, example), strict=True))


@pytest.mark.parametrize(
    "name", ["bert", "llama", "gpt2", "torch_encoder", *slow("vit", "whisper", "qwen3", "swin", "mamba")]
)
def test_a_layer_left_out_is_a_bypass(traced, name):
    model, example, layout = traced(name)
    axes = layout.of_kind("layer")
    assert axes
    for axis in axes:
        removed = copy.deepcopy(model)
        resize(removed, layout, {axis.name: [i for i in range(axis.size) if i != 1]})
        handle = model.get_submodule(f"{axis.path}.1").register_forward_hook(pass_through, with_kwargs=True)
        expected = outputs(model, example)
        handle.remove()
        for a, b in zip(expected, outputs(removed, example), strict=True):
            assert torch.equal(a, b)


def pass_through(module, args, kwargs, output):
    stream = args[0] if args else kwargs.get("hidden_states", kwargs.get("src"))
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


def test_weights_that_read_the_same_tensor(traced):
    linears = traced("llama")[2].linears
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert len({linears[n].reads for n in names}) == 1
    assert linears["model.layers.0.mlp.gate_proj.weight"].reads == linears["model.layers.0.mlp.up_proj.weight"].reads
    assert linears["model.layers.0.mlp.down_proj.weight"].reads != linears[names[0]].reads
    assert traced("gpt2")[2].linears["transformer.h.0.attn.c_attn.weight"].in_dim == 0


def test_products_count_multiplications(traced):
    """BERT by hand: 14 positions x 24 x 24 for each projection, 2 x 4 heads x 7 x 7 x 6 for the scores."""
    layout = traced("bert")[2]
    from secateur.dims import extent

    macs = {}
    for product in layout.products:
        count = product.calls
        for dim in product.dims:
            count *= extent(dim, layout.sizes)
        macs.setdefault(product.weight, []).append(count)
    assert macs["bert.encoder.layer.0.attention.self.query.weight"] == [14 * 24 * 24]
    assert macs["classifier.weight"] == [2 * 24 * 2]
    assert macs[None] == [2 * 4 * 7 * 7 * 6] * 4


def test_tied_weights(traced):
    layout = traced("gpt2")[2]
    assert layout.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_the_model_comes_back_as_it_was():
    model, example = structure("llama")
    model.train()
    model.config.use_cache = True
    before = copy.deepcopy(model.config.to_dict())
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    trace(model, example)
    assert all(m.training for m in model.modules())
    assert model.config.to_dict() == before
    assert weights == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert torch.backends.mha.get_fastpath_enabled()


def test_meta_device_gives_the_same_layout(traced):
    import transformers

    example = traced("llama")[1]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(traced("llama")[0].config)
    assert str(trace(model, example)) == str(traced("llama")[2])


class Odd(nn.Module):
    """Two linears around an operation under test."""

    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(6, 8), nn.Linear(8, 6), between

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


def inner(between):
    model = Odd(between).eval()
    layout = trace(model, (torch.randn(3, 5, 6),))
    (name,) = (format_dims(layout.params["up.bias"]),)
    return layout.axes.get(name)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda y: y.softmax(-1), "softmax"),
        (lambda y: y - y.mean(-1, keepdim=True), "averaged"),
        (lambda y: nn.functional.layer_norm(y, (8,)), "normalised by layer_norm"),
        (lambda y: y * (y.sum(-1, keepdim=True) / y.shape[-1]), "may follow its size"),
        (lambda y: y.cumsum(-1), "cumsum"),
        (lambda y: y * torch.arange(8), "numbered by aten.arange"),
        (lambda y: torch.special.bessel_j0(y), "no rule for aten.special_bessel_j0"),
        (lambda y: y + y.flip(-1), "flipped"),
        (lambda y: y * y.sigmoid().sum(-1, keepdim=True), "need not vanish"),
        (lambda y: y + y[..., torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])], "chosen by an index"),
    ],
)
def test_units_that_depend_on_one_another_are_frozen(between, reason):
    axis = inner(between)
    assert axis is not None
    assert reason in axis.frozen


@pytest.mark.parametrize(
    "between",
    [
        torch.sigmoid,
        lambda y: torch.exp(y) + 1,
        lambda y: y * y.abs().sum(-1, keepdim=True),
        lambda y: y * torch.linalg.vector_norm(y, dim=-1, keepdim=True),
        lambda y: torch.where(y > 0, y, torch.full_like(y, 2.0)),
    ],
)
def test_units_that_stand_alone_are_free_and_exact(between):
    model = randomize(Odd(between))
    example = (torch.randn(3, 5, 6),)
    layout = trace(model, example)
    (axis,) = [a for a in layout.axes.values() if a.kind in ("dense", "rank", "ffn")]
    assert axis.frozen is None
    assert difference(model, layout, {axis.name: [0, 3, 5]}, example) <= 1e-6


@pytest.mark.slow
def test_a_model_that_cannot_be_exported():
    class Loops(nn.Module):
        def forward(self, x):
            return x * 2 if bool((x.sum() > 0).item()) else x

    with pytest.raises(ModelError, match=r"Loops cannot be exported.*Layout.from_text"):
        trace(Loops(), (torch.randn(3),))


def test_strict_names_operations_without_a_rule():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 8)

        def forward(self, x):
            return torch.linalg.qr(self.up(x))[1]

    trace(Strange(), (torch.randn(9, 6),))
    with pytest.raises(ModelError, match=r"operations without a rule: .*qr.*leave strict out"):
        trace(Strange(), (torch.randn(9, 6),), strict=True)


def test_a_defect_of_a_rule_raises_under_test_and_freezes_for_users(monkeypatch):
    def broken(call):
        return {}["flags"]

    monkeypatch.setitem(RULES, "hardswish", broken)
    with pytest.raises(KeyError, match="flags"):
        inner(nn.functional.hardswish)
    monkeypatch.delenv(STRICT_RULES)
    axis = inner(nn.functional.hardswish)
    assert axis.frozen == "internal error in the rule of aten.hardswish: KeyError: 'flags'; please report it"
    layout = trace(Odd(nn.functional.hardswish), (torch.randn(3, 5, 6),))
    assert Layout.from_text(str(layout)) == layout
    with pytest.raises(ModelError, match=r"internal error in the rule of aten.hardswish.*please report it"):
        trace(Odd(nn.functional.hardswish), (torch.randn(3, 5, 6),), strict=True)


@pytest.mark.slow
def test_python_without_asserts_gives_the_same_layout():
    code = """
import torch
from secateur.torch.trace.derive import trace
model = torch.nn.TransformerEncoderLayer(24, 4, 40, batch_first=True).eval()
print(trace(model, (torch.rand(2, 5, 24),)))
"""
    plain, optimised = (
        subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True).stdout
        for options in ([], ["-O"])
    )
    assert "head" in plain
    assert optimised == plain
