"""What the traced graph lets packed layers take in: the residual and the norm after them."""

import copy
import json
import pickle
from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from secateur import runtime
from secateur.errors import ModelError
from secateur.kernels.native import load_native
from secateur.runtime import compile_model, saving
from secateur.runtime.layers import attention, operators
from secateur.runtime.layers.linear import ByTokens
from secateur.runtime.run.install_chain import ChainOutcome
from tests import zoo
from tests.runtime.checks import compare, compare_from_threads, fused_modules

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")

CALLS = "residuals and norms"
WHAT = ("activations", CALLS, "gates", "norms")


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch):
    """No blocks as one call, which would hide what is fused into their layers."""
    monkeypatch.setattr(compile_model, "chain_blocks", lambda *args, **options: ChainOutcome())
    monkeypatch.setattr(compile_model, "step_blocks", lambda *args, **options: (0, ""))


CASES = {
    "bert": ("BertForMaskedLM", {"num_hidden_layers": 2}, {CALLS: 5, "activations": 3}),
    "distilbert": ("DistilBertForSequenceClassification", {}, {"activations": 2}),
    "vit": (None, {"num_hidden_layers": 2}, {"activations": 2}),
    "llama": (
        None,
        {"num_hidden_layers": 2, "tie_word_embeddings": False},
        {"activations": 2, "gates": 2, "norms": 5},
    ),
}


def pruned(name):
    """A pruned model, what it is called with, and how much of it is fused."""
    cls, options, fused = CASES[name]
    model = zoo.pruned(zoo.build(name, cls, **options))
    return model, zoo.inputs(model), Counter(fused)


@pytest.fixture(params=CASES)
def case(request):
    return pruned(request.param)


@pytest.mark.parametrize("tokens", [18, (1, 18)])
def test_fused_models_equal_the_pruned_ones(case, tokens, calls):
    model, batch, fused = case
    plain = runtime.compile(model, tokens=tokens, measure=False)
    calls.clear()
    compare(plain, model, batch)
    before = Counter(calls)
    fast = runtime.compile(model, tokens=tokens, measure=False, example=batch)
    assert +Counter(fast.secateur_report.fused) == fused
    calls.clear()
    compare(fast, model, batch)
    assert calls["linear_after"] == fused[CALLS] + fused["gates"]
    assert calls["linear"] == before["linear"] - calls["linear_after"]
    assert calls["norm"] == fused["norms"]
    small = {name: value[:1] for name, value in batch.items()}
    compare(fast, model, small)
    text = fast.summary()
    assert text.endswith(" Fused: " + ", ".join(f"{fused[w]} {w}" for w in WHAT if fused[w]) + ".")
    assert "Fused" not in plain.summary()


@pytest.mark.parametrize(
    ("name", "backend"),
    [("llama", "eager"), *(pytest.param("bert", c, marks=pytest.mark.slow) for c in ("eager", "aot_eager"))],
)
def test_torch_compile_keeps_the_calls(name, backend, calls):
    model, batch, fused = pruned(name)
    fast = runtime.compile(model, measure=False, example=batch)
    compare(fast, model, batch)
    once = Counter(calls)
    torch.compiler.reset()
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    compare(compiled, model, batch)
    calls.clear()
    compare(compiled, model, batch)
    assert calls["linear"] == once["linear"]
    assert calls["linear_after"] == fused[CALLS] + fused["gates"]
    assert calls["norm"] == fused["norms"]


@pytest.mark.parametrize("tokens", [18, (1, 18)])
def test_saved_and_loaded(case, tokens, calls, tmp_path):
    model, batch, _ = case
    fast = runtime.compile(model, tokens=tokens, measure=False, example=batch)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast")
    calls.clear()
    expected = compare(fast, model, batch)
    counted = Counter(calls)
    calls.clear()
    assert all(map(torch.equal, compare(again, model, batch), expected))
    assert calls == counted


def test_without_kernels_a_saved_model_runs(case, tmp_path, monkeypatch):
    model, batch, _ = case
    runtime.save(runtime.compile(model, measure=False, example=batch), tmp_path / "fast")
    for module in (saving, operators, attention):
        monkeypatch.setattr(module, "load_native", lambda: None)
    compare(runtime.load(tmp_path / "fast"), model, batch)


class Output(nn.Module):
    """norm(dropout(linear(x)) + residual), with names that nobody else uses."""

    def __init__(self, norm=nn.LayerNorm, width=40):
        super().__init__()
        self.mix, self.scale = nn.Linear(24, width), norm(width)
        self.lose = nn.Dropout(0.5)

    def forward(self, residual, x):
        return self.scale(residual + self.lose(self.mix(x)))


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, residual):
        return self.inner(residual, x=x)


def fused(make, **options):
    model = zoo.plain(lambda: Holder(make()))
    example = (torch.randn(2, 5, 24), torch.randn(2, 5, 40))
    return model, runtime.compile(model, measure=False, example=example, **options), example


def is_fused(fast):
    return fused_modules(fast) == ["inner"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False)])
def test_nan_and_layouts_reach_the_output(norm, calls):
    model, fast, (x, residual) = fused(lambda: Output(norm))
    assert is_fused(fast)
    odd = x.clone()
    odd[0, 1, 3], odd[1, 2, 0] = float("nan"), float("inf")
    lost = residual.clone()
    lost[1, 1, 1] = float("nan")
    wide = torch.randn(2, 5, 80)[..., ::2]
    with torch.inference_mode():
        for args in ((x, residual), (odd, residual), (x, lost), (x, wide), (x[:0], residual[:0])):
            calls.clear()
            got, expected = fast(*args), model(*args)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert calls["linear_after"] == 1
        assert fast(odd, residual)[0, 1].isnan().all()
        assert not fast(odd, residual)[0, 0].isnan().any()


def test_copies_run_as_one_call(calls):
    layer = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24))  # a class that pickle finds
    fast = runtime.compile(zoo.pruned(nn.Sequential(layer, nn.Tanh())), measure=False, example=(torch.randn(3, 24),))
    x = torch.randn(3, 24)
    with torch.inference_mode():
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compile_model.share_copy(fast)):
            calls.clear()
            assert torch.equal(again(x), fast(x))
            assert calls["linear_after"] == 2


def test_calls_that_the_kernels_do_not_know_run_as_before(calls):
    model, fast, (x, residual) = fused(Output)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x, residual[:1]), model(x, residual[:1]), rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            fast.inner(residual)
        fast.inner.lose.p = 1.0
        torch.testing.assert_close(fast.train()(x, residual), model.inner.scale(residual), rtol=1e-5, atol=1e-5)
        assert calls["linear_after"] == 0
    fast.eval()
    assert fast(x, residual).requires_grad  # through the weights of the norm
    with pytest.raises(RuntimeError, match="no backward"):
        fast(x.requires_grad_(), residual)


def test_hooks_prevent_fusion(calls):
    seen = []
    inner = Output()
    inner.scale.register_forward_hook(lambda *_: seen.append("before"))
    _, fast, example = fused(lambda: inner)
    assert not is_fused(fast)
    with torch.inference_mode():
        seen.clear()
        fast(*example)
        assert seen == ["before"]
        _, fast, example = fused(Output)
        assert is_fused(fast)
        fast.inner.lose.register_forward_hook(lambda *_: seen.append("late"))
        fast(*example)
        assert seen == ["before", "late"]
    assert calls["linear_after"] == 0


def test_other_modules_are_left_alone():
    class Twice(Output):
        def forward(self, residual, x):
            return super().forward(residual, x) * 2

    class Inner(Output):
        def forward(self, residual, x):
            return self.scale(self.lose(self.mix(x)) + residual.sum(-1, keepdim=True))

    class Pair(Output):
        def forward(self, residual, x):
            hidden = self.mix(x)
            return self.scale(hidden + residual), hidden

    class Scaled(Output):
        def forward(self, residual, x):
            return self.scale(torch.add(self.mix(x), residual, alpha=2))

    class Stored(Output):
        def __init__(self):
            super().__init__()
            self.register_buffer("stored", torch.randn(2, 5, 40))

        def forward(self, residual, x):
            return self.scale(self.mix(x) + self.stored)

    class Repeated(Holder):
        def forward(self, x, residual):
            return self.inner(self.inner(residual, x=x), x=x)

    for cls in (Twice, Inner, Pair, Scaled, Stored):
        model, fast, example = fused(cls)
        assert not fused_modules(fast), cls
        with torch.inference_mode():
            for got, expected in zip(fast(*example), model(*example), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model = zoo.plain(lambda: Repeated(Output()))
    example = (torch.randn(2, 5, 24), torch.randn(2, 5, 40))
    assert not fused_modules(runtime.compile(model, measure=False, example=example))
    shared_norm = nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)), nn.Sequential(nn.Linear(24, 24)))
    shared_norm[1].append(shared_norm[0][1])
    fast = runtime.compile(zoo.pruned(shared_norm), measure=False, example=(torch.randn(3, 24),))
    assert not fused_modules(fast)


def test_a_norm_alone_and_a_residual_of_the_input(calls):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.act, self.scale = nn.Linear(24, 24), nn.GELU(), nn.LayerNorm(24)

        def forward(self, x):
            return self.scale(self.act(self.mix(x)) + x)

    normed = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24))
    model = zoo.plain(lambda: nn.Sequential(normed, Block(), nn.Linear(24, 5)))
    x = torch.randn(3, 7, 24)
    fast = runtime.compile(model, measure=False, example=(x,))
    assert fused_modules(fast) == ["0", "1"]
    with torch.inference_mode():
        calls.clear()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls["linear_after"] == 2


def test_an_activation_that_stays_is_not_lost():
    """Layers that are sparse for one token only: no format stores single int8 weights for many."""

    def model():
        return nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.LayerNorm(24)), nn.Linear(24, 24))

    options = {"tokens": (1, 100), "value": "int8", "measure": False}
    whole = zoo.plain(model)
    fast = runtime.compile(whole, **options, example=(torch.randn(3, 24),))
    assert isinstance(fast[0][0], ByTokens)
    assert isinstance(fast[0][1], nn.ReLU)
    plain = runtime.compile(
        zoo.plain(lambda: Holder(Output())),
        **options,
        example=(torch.randn(2, 5, 24), torch.randn(2, 5, 40)),
    )
    assert is_fused(plain)
    with torch.inference_mode():
        for tokens in (1, 90):
            x, residual = torch.randn(tokens, 24), torch.randn(tokens, 40)
            assert (fast(x) - whole(x)).norm() < 0.03 * whole(x).norm()
            expected = plain.inner.scale(plain.inner.mix(x) + residual)
            torch.testing.assert_close(plain(x, residual), expected, rtol=1e-5, atol=1e-5)


def test_tracers_and_profilers_see_the_operators():
    _, fast, (x, residual) = fused(Output)
    with torch.inference_mode():
        expected = fast(x, residual)
        with torch.profiler.profile() as seen:
            fast(x, residual)
        assert "secateur::sparse_linear_after" in {event.key for event in seen.key_averages()}
        graph = make_fx(fast)(x, residual)
        assert torch.equal(graph(x, residual), expected)
        assert any(node.target is operators.sparse_linear_after for node in graph.graph.nodes)
        traced = torch.jit.trace(fast, (x, residual), check_trace=False)
        assert torch.equal(traced(x + 1, residual), fast(x + 1, residual))


def test_two_threads_at_once():
    model, fast, _ = fused(Output)
    batches = [{"x": torch.randn(2, 50, 24), "residual": torch.randn(2, 50, 40)} for _ in range(2)]
    compare_from_threads(fast, model, batches, turns=20)


def test_operator_passes_torch_checks_and_runs_without_kernels(monkeypatch):
    _, fast, (x, residual) = fused(Output)
    layer, norm = fast.inner.mix, fast.inner.scale
    scale, shift = norm.weight.detach(), norm.bias.detach()
    call = (x, layer.packed, layer.bias, 40, 2, None, residual, 1, scale, shift, 1e-3)
    rms = (*call[:7], 2, scale, None, 1e-3)
    gated = (*call[:5], residual, residual, 2, scale, None, 1e-3)
    bare = (*call[:6], None, 0, None, None, 0.0)
    each_norm = [
        (residual, 1, scale, shift, 1e-3),
        (residual, 2, scale, None, 1e-3),
        (residual[..., 1:], 2, None, None, 0.1),
    ]
    calls = [(operators.sparse_linear_after, c) for c in (call, rms, gated, bare)] + [
        (operators.norm, c) for c in each_norm
    ]
    for operator, arguments in (calls[0], calls[-1]):
        torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])
    got = [operator(*arguments) for operator, arguments in calls]
    for (operator, arguments), each in zip(calls, got, strict=True):
        assert torch.equal(operators.run(operator, *arguments), each)
    monkeypatch.setattr(operators, "load_native", lambda: None)
    for (operator, arguments), each in zip(calls, got, strict=True):
        torch.testing.assert_close(operator(*arguments), each, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"the residual is \(1, 5, 40\), but the output \(2, 5, 40\)"):
        operators.sparse_linear_after(*call[:6], residual[:1], *call[7:])
    with pytest.raises(ValueError, match=r"the gate is \(1, 5, 40\), but the output \(2, 5, 40\)"):
        operators.sparse_linear_after(*call[:5], residual[:1], *call[6:])
    with pytest.raises(ValueError, match=r"float32 \(40,\), not torch.float32 \(39,\)"):
        operators.sparse_linear_after(*call[:8], scale[1:], *call[9:])


def test_damaged_fusions_are_a_sentence(tmp_path):
    model, batch, _ = pruned("bert")
    runtime.save(runtime.compile(model, measure=False, example=batch), tmp_path / "fast")
    path = tmp_path / "fast" / "runtime.json"
    manifest = json.loads(path.read_text())
    one = next(iter(manifest["one_calls"]))
    for change, match in (
        ({"one_calls": {one: {**manifest["one_calls"][one], "norm": "batch"}}}, "unknown norm 'batch'"),
        ({"one_calls": {one: {**manifest["one_calls"][one], "linear": "gone"}}}, "has no 'gone'"),
        ({"one_calls": {one: 3}}, "is damaged"),
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ModelError, match=match):
            runtime.load(tmp_path / "fast")
