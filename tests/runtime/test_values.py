"""Patterns of zeros and types of values: which format stores them, and what is rounded where that is asked for."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn

from secateur import runtime
from secateur.kernels.native import load_native
from secateur.kernels.zero_patterns import zeros_of
from secateur.runtime.layers import tuning as choosing
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from tests import zoo
from tests.zoo import linear

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


@pytest.mark.parametrize(("block", "value"), [(8, "float16"), (4, "int8"), (8, "float32")])
def test_blocks_are_found_and_kept_through_save_and_load(block, value, tmp_path):
    layer = linear(96, 61, f"{block}x1")
    fast = runtime.compile(nn.Sequential(layer), measure=False, value=value)
    info = fast[0].extra_repr()
    assert f"block {value}" in info
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(96, 61)))
    with torch.inference_mode():
        for tokens in (1, 5, 30):
            x = torch.randn(tokens, 96)
            expected = nn.functional.linear(x, fast[0].dense_weight(), layer.bias)
            assert torch.allclose(fast(x), expected, atol=1e-5)
            assert torch.equal(again(x), fast(x))
    assert torch.allclose(fast[0].dense_weight(), layer.weight, atol=2e-3)  # half a level of int8


@pytest.mark.parametrize(("keep", "of", "value"), [(2, 4, "float16"), (4, 8, "int8"), (1, 4, "float32")])
def test_fixed_counts_are_found_for_few_tokens(keep, of, value, tmp_path):
    model = nn.Sequential(linear(90, 61, f"{keep}:{of}"))
    fast = runtime.compile(model, tokens=1, measure=False, value=value)
    assert f"nm {value}" in fast[0].extra_repr()
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(90, 61)))
    with torch.inference_mode():
        for tokens in (1, 3, 7, 40):
            x = torch.randn(tokens, 90)
            expected = nn.functional.linear(x, fast[0].dense_weight(), model[0].bias)
            assert torch.allclose(fast(x), expected, atol=1e-5)
            assert torch.equal(again(x), fast(x))
    many = runtime.compile(model, tokens=128, measure=False)
    assert "tiled float32" in many[0].extra_repr()


def test_patterns_are_told_apart():
    def zeros(layer):
        return str(zeros_of(layer.weight.detach().numpy()))

    assert zeros(linear(64, 64, "8x1")) == "8x1"
    assert zeros(linear(64, 64, "4x1")) == "4x1"
    assert zeros(linear(66, 64, "1x4")) == "0x1 1x4"
    assert zeros(linear(66, 64, "2:4")) == "0x1 2:4"
    assert zeros(linear(66, 64, "4:8")) == "0x1 4:8"
    assert zeros(linear(66, 64, "1:4")) == "0x1 1:4"
    assert zeros(linear(64, 64)) == "0x1"
    assert str(zeros_of(torch.zeros(9, 3).numpy())) == "0x1"


def test_activations_are_rounded_only_when_asked(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(linear(96, 61, "1x4"), nn.GELU(), linear(61, 5))
    plain = runtime.compile(model, measure=False, value="int8")
    assert plain.secateur_report.layers[0].format == "dense"
    assert "rounded to 8 bits" not in plain.secateur_report.summary()
    x = torch.randn(3, 11, 96)
    fast = runtime.compile(model, measure=False, value="int8", activations="int8", example=(x,))
    assert "1 of 2 linear layers" in fast.secateur_report.summary()
    assert "1 of them with activations rounded to 8 bits at each call" in fast.secateur_report.summary()
    assert "quad int8" in fast[0].extra_repr()
    assert fast[0].activation == "gelu"
    with torch.inference_mode():
        expected = model(x)
        assert (fast(x) - expected).norm() < 0.03 * expected.norm()
        runtime.save(fast, tmp_path / "fast")
        skeleton = nn.Sequential(nn.Linear(96, 61), nn.GELU(), nn.Linear(61, 5))
        assert torch.equal(runtime.load(tmp_path / "fast", skeleton)(x), fast(x))
    with pytest.raises(ValueError, match="activations='int8' goes with value='int8', not 'float32'"):
        runtime.compile(model, activations="int8")
    with pytest.raises(ValueError, match="'float32', 'int8', not 'int4'"):
        runtime.compile(model, activations="int4")


def test_a_measured_layer_may_round_its_activations(monkeypatch):
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, *map(float, range(1, len(runs)))])
    options = {"tokens": 64, "value": "int8", "activations": "int8", "cache": False}
    fast = runtime.compile(linear(512, 512, "1x4", 0.05), **options)
    assert fast.secateur_report.layers[0].format == "quad"


def test_layers_with_few_zeros_are_rounded_where_asked(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(linear(96, 64), nn.GELU(), nn.Linear(64, 43))
    options = {"tokens": (1, 20), "value": "int8", "measure": False}
    plain, fast = runtime.compile(model, **options), runtime.compile(model, dense="int8", **options)
    assert "rounded" not in plain.secateur_report.summary()
    assert "; 1 with few zeros, or a shared weight, only rounded" in fast.secateur_report.summary()
    assert [layer.full for layer in fast.secateur_report.layers] == [False, True]
    assert isinstance(fast[2], ByTokens)
    assert fast[2].layers[1].weight is model[2].weight
    runtime.save(fast, tmp_path / "fast")
    skeleton = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 43))
    again = runtime.load(tmp_path / "fast", skeleton)
    x = torch.randn(20, 96)
    with torch.inference_mode():
        assert torch.equal(fast(x), plain(x))
        one, exact = fast(x[:1]), plain(x[:1])
        assert 0 < (one - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(again(x[:1]), one)
        assert torch.equal(again(x), fast(x))
    with pytest.raises(ValueError, match="dense must be one of .*, not 'int4'"):
        runtime.compile(model, dense="int4")
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, 3.0, 3.0][: len(runs)])
    timed = runtime.compile(model, tokens=1, value="int8", dense="float16", cache=False)
    assert "only rounded and 3.0 times as fast" in timed.secateur_report.summary()
    monkeypatch.setattr(choosing, "interleaved", lambda runs, cold: [9.0, 9.0, 9.0][: len(runs)])
    timed = runtime.compile(model, tokens=1, value="int8", dense="float16", cache=False)
    assert "1 because they measured no faster rounded" in timed.secateur_report.summary()


def test_an_output_layer_that_shares_its_weight_is_rounded_in_a_copy():
    model = zoo.pruned(zoo.llama(num_hidden_layers=2), only=lambda m: zoo.is_linear(m) and m.out_features != zoo.VOCAB)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = {"input_ids": torch.arange(9)[None]}
    before = model.lm_head.weight.clone()
    fast = runtime.compile(model, tokens=1, value="int8", dense="int8", measure=False, example=ids)
    assert isinstance(fast.lm_head, SparseLinear)
    assert fast.model.embed_tokens.weight is model.lm_head.weight
    assert torch.equal(model.lm_head.weight, before)
    with torch.inference_mode():
        got, exact = fast(**ids).logits, model(**ids).logits
        assert (got - exact).norm() < 0.05 * exact.norm()
        assert fast.generate(**ids, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_value_type_without_a_format_stays_dense():
    fast = runtime.compile(linear(64, 64), measure=False, value="float16")
    assert "1 because no format stores float16" in fast.secateur_report.summary()
    few = runtime.compile(linear(64, 64), measure=False, value="int8", tokens=1)
    assert few.secateur_report.layers[0].format == "bitmask"


def test_decoding_is_measured_with_cold_weights():
    fast = runtime.compile(linear(512, 512, "8x1", 0.05), tokens=1, value="int8")
    layer = fast.secateur_report.layers[0]
    assert layer.format in ("block", "bitmask", "dense")
    assert min(layer.dense_us, layer.sparse_us) > 0
