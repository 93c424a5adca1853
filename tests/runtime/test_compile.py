"""secateur.runtime.compile, save and load on tiny random models."""

import contextlib
import json
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.native import load_native
from secateur.runtime import compile_model
from secateur.runtime.layers import tuning as choosing
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from tests import zoo
from tests.zoo import linear

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


OPTIONS = {
    "bert": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "llama": {"num_hidden_layers": 2, "tie_word_embeddings": False},
}


def pruned(name, **options):
    return zoo.pruned(zoo.build(name, **{**OPTIONS[name], **options}))


@pytest.fixture(params=OPTIONS)
def model(request):
    return pruned(request.param)


def ids(batch=2, length=9):
    return torch.randint(0, zoo.VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def test_compiled_model_equals_the_pruned_one(model):
    fast = runtime.compile(model, measure=False)
    assert any(isinstance(m, SparseLinear) for m in fast.modules())
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    with torch.inference_mode():
        assert torch.allclose(fast(ids()).logits, model(ids()).logits, atol=1e-5)


def test_dense_weights_are_shared_not_copied():
    model = pruned("bert")
    fast = runtime.compile(model, measure=False)
    assert fast.bert.embeddings.word_embeddings.weight is model.bert.embeddings.word_embeddings.weight


def test_torch_compile_keeps_the_kernels_in_one_graph():
    model = pruned("bert")
    fast = runtime.compile(model, measure=False)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.allclose(compiled(ids()).logits, model(ids()).logits, atol=1e-5)


def test_operator_passes_torch_checks():
    layer = runtime.compile(linear(40, 30), measure=False)
    assert isinstance(layer, SparseLinear)
    args = (torch.randn(3, 5, 40), layer.packed, layer.bias, 30, 0)
    torch.library.opcheck(
        torch.ops.secateur.sparse_linear.default,
        args,
        test_utils=["test_schema", "test_faketensor"],
    )


def test_generate_gives_the_same_tokens():
    model = pruned("llama")
    fast = runtime.compile(model, measure=False)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(ids(1), **kwargs), model.generate(ids(1), **kwargs))


def test_measured_choice_is_remembered_and_reported(tmp_path):
    model = zoo.pruned(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)), 0.02)
    fast = runtime.compile(model, tokens=64)
    report = fast.secateur_report
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert all(layer.dense_us > 0 and layer.sparse_us > 0 for layer in report.layers)
    assert fast.summary() == report.summary()
    stored = json.loads(choosing.cache_file().read_text())["machines"][choosing.machine_key()]
    assert len(stored) == 2
    again = runtime.compile(model, tokens=64).secateur_report
    assert [layer.dense_us for layer in again.layers] == [layer.dense_us for layer in report.layers]


def changed_cache(weight, choice):
    """The file of measurements with a changed choice for a layer."""
    choosing.choose(weight, None, tokens=32)
    data = json.loads(choosing.cache_file().read_text())
    (known,) = data["machines"].values()
    return json.dumps({**data, "machines": {choosing.machine_key(): {k: {**v, **choice} for k, v in known.items()}}})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{not json", "is damaged: .*; it is ignored, and layers are measured again"),
        ("[" * 5000, "is damaged: it is nested more than"),
        (f'{{"version": {choosing.CACHE_VERSION}}}', "machines"),
        (f'{{"version": {choosing.CACHE_VERSION}, "machines": {{"mine": 3}}}}', "is 3"),
        ({"dense_us": "fast"}, "dense_us"),
        ({"packing": {"format": [1]}}, "packing"),
        ({"code": 1}, "code"),
        ({"packing": {"format": "nm", "keep": 3, "of": 7, "value": "float32"}}, ""),
        ({"packing": {"shape": "round"}}, ""),
    ],
)
def test_broken_cache_is_measured_anew(text, match):
    choosing.cache_file().parent.mkdir(parents=True, exist_ok=True)
    weight = np.ascontiguousarray(linear(128, 128, density=0.05).weight.detach().numpy())
    choosing.cache_file().write_text(text if isinstance(text, str) else changed_cache(weight, text))
    with pytest.warns(RuntimeWarning, match=match) if match else contextlib.nullcontext():
        choice = choosing.choose(weight, None, tokens=32)
    assert choice.dense_us > 0
    assert choice.packing is None or choice.packing["format"] in ("tiled", "block", "bitmask")
    assert choosing.choose(weight, None, tokens=32) == choice


def test_summary_says_why_layers_stay_dense():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64).double())
    zoo.pruned(model[0])
    text = runtime.compile(model, measure=False).summary()
    assert text.startswith("1 of 3 linear layers")
    assert "kernels, not timed, at 0." in text
    assert "1 with fewer than 30% zeros" in text
    assert "torch.float64" in text
    assert runtime.compile(nn.ReLU()).summary() == "No layer of 0 runs on the sparse kernels."


def test_tied_and_hooked_layers_stay_dense():
    model = pruned("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data[:, ::2] = 0
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    reasons = {layer.name: layer.reason for layer in runtime.compile(model, measure=False).secateur_report.layers}
    assert "share" in reasons["lm_head"]
    assert "hooks" in reasons["model.layers.0.mlp.up_proj"]


def test_layouts_of_inputs_and_empty_batches():
    layer = linear(24, 10)
    fast = runtime.compile(layer, measure=False)
    x = torch.randn(4, 6, 24)
    with torch.inference_mode():
        for each in (
            x,
            x.transpose(0, 1),
            x[0, 0],
            x[:, ::2],
            torch.randn(24, 5).t(),
            x[:1].expand(3, 6, 24),
            x[:0],
        ):
            got = fast(each)
            assert got.shape == layer(each).shape
            assert torch.allclose(got, layer(each), atol=1e-6)


def test_errors_say_what_to_do():
    fast = runtime.compile(linear(24, 10), measure=False)
    with pytest.raises(RuntimeError, match="no backward"):
        fast(torch.randn(2, 24, requires_grad=True))
    with pytest.raises(TypeError, match=r"float32 activations, not torch.float64"):
        fast(torch.randn(2, 24).double())
    with pytest.raises(ValueError, match=r"packed weight is \(10, 24\), but the input has 23 features"):
        fast(torch.randn(2, 23))
    with pytest.raises(TypeError, match="stays on the CPU"):
        fast.to("meta")
    with pytest.raises(TypeError, match="float32"):
        fast.half()
    with pytest.raises(ValueError, match="tokens must be positive, not 0"):
        runtime.compile(nn.Linear(2, 2), tokens=0)
    with pytest.raises(ValueError, match="'float16', 'int8', not 'int4'"):
        runtime.compile(nn.Linear(2, 2), value="int4")


def test_save_and_load_round_trip(model, tmp_path):
    fast = runtime.compile(model, measure=False)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast")
    assert type(again) is type(model)
    packed = next(m.packed for m in again.modules() if isinstance(m, SparseLinear))
    assert packed.untyped_storage().nbytes() >= packed.numel()
    with torch.inference_mode():
        assert torch.equal(again(ids()).logits, fast(ids()).logits)


def test_load_into_a_given_skeleton(tmp_path):
    model = zoo.pruned(nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)))
    fast = runtime.compile(model, measure=False)
    runtime.save(fast, tmp_path / "fast")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    x = torch.randn(5, 40)
    with torch.inference_mode():
        assert torch.equal(runtime.load(tmp_path / "fast", skeleton)(x), fast(x))
    with pytest.raises(ValueError, match=r"does not fit|but .* in the file|no layer"):
        runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(41, 40), nn.Tanh(), nn.Linear(40, 3)))
    with pytest.raises(ValueError, match="pass a skeleton"):
        runtime.load(tmp_path / "fast")


def test_damaged_file_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    runtime.save(runtime.compile(zoo.pruned(nn.Sequential(nn.Linear(40, 40))), measure=False), tmp_path / "fast")
    tensors = load_file(tmp_path / "fast" / "runtime.safetensors")
    tensors["0.packed"][128:160] = 255
    save_file(tensors, tmp_path / "fast" / "runtime.safetensors")
    with pytest.raises(ValueError, match=r"layer '0': .*damaged"):
        runtime.load(tmp_path / "fast", nn.Sequential(nn.Linear(40, 40)))


def test_nothing_to_save_or_load(tmp_path):
    with pytest.raises(ValueError, match="no packed layer"):
        runtime.save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ModelError, match=r"holds no runtime\.json"):
        runtime.load(tmp_path / "fast")


def test_activations_are_fused_where_the_graph_allows(tmp_path):
    model = pruned("bert")
    batch = {"input_ids": ids()}
    fast = runtime.compile(model, measure=False, example=batch)
    dense = [layer.intermediate.dense for layer in fast.bert.encoder.layer]
    assert [layer.activation for layer in dense] == ["gelu", "gelu"]
    assert isinstance(fast.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    assert not isinstance(model.bert.encoder.layer[0].intermediate.intermediate_act_fn, nn.Identity)
    with torch.inference_mode():
        assert torch.allclose(fast(**batch).logits, model(**batch).logits, atol=1e-5)
        runtime.save(fast, tmp_path / "fast")
        assert torch.equal(runtime.load(tmp_path / "fast")(**batch).logits, fast(**batch).logits)


def test_an_activation_that_others_need_is_not_fused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act, self.silu = nn.Linear(32, 32), nn.Linear(32, 32), nn.ReLU(), nn.SiLU()

        def forward(self, x):
            hidden = self.a(x)
            return self.act(hidden) + hidden + self.silu(self.b(self.act(x)))

    model = zoo.plain(Both)
    x = torch.randn(20, 32)
    fast = runtime.compile(model, measure=False, example=(x,))
    assert (fast.a.activation, fast.b.activation) == ("none", "silu")
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), atol=1e-6)


def test_no_candidate_is_always_timed_after_the_same_one():
    calls = []
    choosing.interleaved([partial(calls.append, number) for number in range(4)])
    for number in range(4):
        before = {one for one, other in pairwise(calls) if other == number}
        assert len(before - {number}) > 1
    rounds = [sorted(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert rounds == [[0, 1, 2, 3]] * len(rounds)


def test_a_layer_takes_the_variant_for_the_call(monkeypatch, tmp_path):
    def at_few_tokens(array, bias, *, tokens, **_):
        packing = {"format": "bitmask"} if tokens == 1 else {"format": "tiled"} if array.shape[0] == 64 else None
        return choosing.FormatChoice(packing, 2.0, 1.0)

    monkeypatch.setattr(compile_model, "choose", at_few_tokens)
    model = zoo.pruned(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 5)))
    fast = runtime.compile(model, tokens=(1, 100), example=(torch.randn(3, 40),))
    assert isinstance(fast[0], ByTokens)
    assert [variant.activation for variant in fast[0].layers] == ["relu", "relu"]
    assert isinstance(fast[1], nn.Identity)
    assert fast[2].layers[1].weight is model[2].weight
    used = []
    for number, variant in enumerate(fast[0].layers):
        variant.register_forward_hook(lambda *_, number=number: used.append(number))
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(
        tmp_path / "fast", zoo.pruned(nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 5)), seed=3)
    )
    with torch.inference_mode():
        for shape in ((1, 40), (2, 5, 40), (11, 40), (0, 40)):
            x = torch.randn(shape)
            assert torch.allclose(fast(x), model(x), atol=1e-6)
            assert torch.equal(again(x), fast(x))
    assert used == [0, 0, 0, 0, 1, 1, 0, 0]
    text = fast.summary()
    assert text.startswith("2 of 2 linear layers")
    assert "2.0 times as fast as dense at 1 tokens" in text
    assert "At 100 tokens: 1 of 2 linear layers" in text


def test_a_variant_is_chosen_without_the_lookups_of_modules(monkeypatch):
    variants = [nn.Linear(4, 3) for _ in range(3)]
    layer = ByTokens(variants, (1, 4, 64))  # so that it changes after 2 and after 16 tokens

    def slow(*_):
        raise AssertionError("for each layer of each token, this takes as long as the layer")

    monkeypatch.setattr(nn.ModuleList, "__getitem__", slow)
    monkeypatch.setattr(nn.Module, "__getattr__", slow)
    for tokens, number in {0: 0, 1: 0, 2: 0, 3: 1, 16: 1, 17: 2, 1000: 2}.items():
        assert layer.layer_for_tokens(tokens) is variants[number]
        assert layer.layer_for(torch.ones(tokens, 1, 4)) is variants[number]


def test_a_layer_of_one_variant_is_held_once():
    model = linear(96, 64, "8x1")
    assert isinstance(runtime.compile(model, tokens=(1, 64), measure=False), SparseLinear)
    with pytest.raises(ValueError, match=r"tokens must be positive, not \(0, 4\)"):
        runtime.compile(model, tokens=(0, 4))
