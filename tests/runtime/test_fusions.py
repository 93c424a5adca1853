"""What the traced graph lets packed layers take in: the residual and the norm after them."""

import copy
import json
import pickle
import threading
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
from secateur.runtime.layers import tuning as choosing
from secateur.runtime.layers.fused import fused_modules
from secateur.runtime.layers.linear import ByTokens
from secateur.runtime.run.install_chain import ChainOutcome

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")

CALLS = "residuals and norms"
WHAT = ("activations", CALLS, "gates", "norms")


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch):
    """No blocks as one call, which would hide what is fused into their layers."""
    monkeypatch.setattr(compile_model, "chain_blocks", lambda *args, **kwargs: ChainOutcome())
    monkeypatch.setattr(compile_model, "step_blocks", lambda *args: (0, ""))


def prune(model, density=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data.mul_(torch.rand(module.weight.shape, generator=generator) < density)
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return model.eval()


def ids(batch=2, length=9):
    return {"input_ids": torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(1))}


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=128)
    return transformers.BertForMaskedLM(config), ids(), Counter({CALLS: 5, "activations": 3})


def distilbert():
    config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=99)
    model = transformers.DistilBertForSequenceClassification(config)
    return model, ids(), Counter({"activations": 2})


def vit():
    config = transformers.ViTConfig(**SIZES, intermediate_size=128, image_size=16, patch_size=4)
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}, Counter({"activations": 2})


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), ids(), Counter({"activations": 2, "gates": 2, "norms": 5})


@pytest.fixture(params=[bert, distilbert, vit, llama], ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    model, batch, fused = request.param()
    return prune(model), batch, fused


@pytest.fixture
def native(monkeypatch):
    """How often each function of the kernels is called."""
    calls, real = Counter(), load_native()

    class Counting:
        def __getattr__(self, name):
            calls[name] += 1
            return getattr(real, name)

    monkeypatch.setattr(operators, "load_native", lambda: Counting())
    return calls


def always_sparse(array, bias, *, tokens, value, activations, **_):
    tiled = choosing.unmeasured(array, tokens=tokens, value=value, activations=activations).packing
    return choosing.FormatChoice({"format": "bitmask"} if tokens == 1 else tiled, 2.0, 1.0)


def compare(fast, model, batch):
    with torch.inference_mode():
        got, expected = fast(**batch).logits, model(**batch).logits
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    return got


@pytest.mark.parametrize(("tokens", "measure"), [(18, False), (18, True), ((1, 18), True)])
def test_fused_models_equal_the_pruned_ones(case, tokens, measure, native, monkeypatch):
    model, batch, fused = case
    monkeypatch.setattr(compile_model, "choose", always_sparse)
    plain = runtime.compile(model, tokens=tokens, measure=measure)
    native.clear()
    compare(plain, model, batch)
    before = Counter(native)
    fast = runtime.compile(model, tokens=tokens, measure=measure, example=batch)
    assert +Counter(fast.secateur_report.fused) == fused
    native.clear()
    compare(fast, model, batch)
    assert native["linear_after"] == fused[CALLS] + fused["gates"]
    assert native["linear"] == before["linear"] - native["linear_after"]
    assert native["norm"] == fused["norms"]
    small = {name: value[:1] for name, value in batch.items()}
    compare(fast, model, small)
    text = fast.summary()
    assert text.endswith(" Fused: " + ", ".join(f"{fused[w]} {w}" for w in WHAT if fused[w]) + ".")
    assert "Fused" not in plain.summary()


@pytest.mark.parametrize(
    ("make", "backend"),
    [(llama, "eager"), *(pytest.param(bert, c, marks=pytest.mark.slow) for c in ("eager", "aot_eager"))],
)
def test_torch_compile_keeps_the_calls(make, backend, native):
    torch.manual_seed(0)
    model, batch, fused = make()
    fast = runtime.compile(prune(model), measure=False, example=batch)
    compare(fast, model, batch)
    once = Counter(native)
    torch.compiler.reset()
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    compare(compiled, model, batch)
    native.clear()
    compare(compiled, model, batch)
    assert native["linear"] == once["linear"]
    assert native["linear_after"] == fused[CALLS] + fused["gates"]
    assert native["norm"] == fused["norms"]


@pytest.mark.parametrize("tokens", [18, (1, 18)])
def test_saved_and_loaded(case, tokens, native, tmp_path, monkeypatch):
    model, batch, _ = case
    monkeypatch.setattr(compile_model, "choose", always_sparse)
    fast = runtime.compile(model, tokens=tokens, example=batch)
    runtime.save(fast, tmp_path / "fast")
    again = runtime.load(tmp_path / "fast")
    native.clear()
    expected = compare(fast, model, batch)
    calls = Counter(native)
    native.clear()
    assert torch.equal(compare(again, model, batch), expected)
    assert native == calls


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


def fused(inner, **options):
    torch.manual_seed(0)
    model = prune(Holder(inner))
    example = (torch.randn(2, 5, 24), torch.randn(2, 5, 40))
    return model, runtime.compile(model, measure=False, example=example, **options), example


def is_fused(fast):
    return list(fused_modules(fast)) == ["inner"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False)])
def test_nan_and_layouts_reach_the_output(norm, native):
    model, fast, (x, residual) = fused(Output(norm))
    assert is_fused(fast)
    odd = x.clone()
    odd[0, 1, 3], odd[1, 2, 0] = float("nan"), float("inf")
    lost = residual.clone()
    lost[1, 1, 1] = float("nan")
    wide = torch.randn(2, 5, 80)[..., ::2]
    with torch.inference_mode():
        for args in ((x, residual), (odd, residual), (x, lost), (x, wide), (x[:0], residual[:0])):
            native.clear()
            got, expected = fast(*args), model(*args)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
            assert native["linear_after"] == 1
        assert fast(odd, residual)[0, 1].isnan().all()
        assert not fast(odd, residual)[0, 0].isnan().any()


def test_copies_run_as_one_call(native):
    layer = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24))  # a class that pickle finds
    fast = runtime.compile(prune(nn.Sequential(layer, nn.Tanh())), measure=False, example=(torch.randn(3, 24),))
    x = torch.randn(3, 24)
    with torch.inference_mode():
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), compile_model.share_copy(fast)):
            native.clear()
            assert torch.equal(again(x), fast(x))
            assert native["linear_after"] == 2


def test_calls_that_the_kernels_do_not_know_run_as_before(native):
    model, fast, (x, residual) = fused(Output())
    with torch.inference_mode():
        torch.testing.assert_close(fast(x, residual[:1]), model(x, residual[:1]), rtol=1e-5, atol=1e-5)
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            fast.inner(residual)
        fast.inner.lose.p = 1.0
        torch.testing.assert_close(fast.train()(x, residual), model.inner.scale(residual), rtol=1e-5, atol=1e-5)
        assert native["linear_after"] == 0
    fast.eval()
    assert fast(x, residual).requires_grad  # through the weights of the norm
    with pytest.raises(RuntimeError, match="no backward"):
        fast(x.requires_grad_(), residual)


def test_hooks_prevent_fusion(native):
    seen = []
    inner = Output()
    inner.scale.register_forward_hook(lambda *_: seen.append("before"))
    _, fast, example = fused(inner)
    assert not is_fused(fast)
    with torch.inference_mode():
        seen.clear()
        fast(*example)
        assert seen == ["before"]
        _, fast, example = fused(Output())
        assert is_fused(fast)
        fast.inner.lose.register_forward_hook(lambda *_: seen.append("late"))
        fast(*example)
        assert seen == ["before", "late"]
    assert native["linear_after"] == 0


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
        model, fast, example = fused(cls())
        assert not fused_modules(fast), cls
        with torch.inference_mode():
            for got, expected in zip(fast(*example), model(*example), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model = prune(Repeated(Output()))
    example = (torch.randn(2, 5, 24), torch.randn(2, 5, 40))
    assert not fused_modules(runtime.compile(model, measure=False, example=example))
    shared_norm = nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)), nn.Sequential(nn.Linear(24, 24)))
    shared_norm[1].append(shared_norm[0][1])
    fast = runtime.compile(prune(shared_norm), measure=False, example=(torch.randn(3, 24),))
    assert not fused_modules(fast)


class Pair(nn.Module):
    """down(act(gate(x)) * up(x)), in the ways that it can be written."""

    def __init__(self, act=nn.SiLU, bias=False, down=True, lose=0.0):
        super().__init__()
        self.gate, self.up = nn.Linear(24, 40, bias), nn.Linear(24, 40, bias)
        self.act = act() if isinstance(act, type) else act
        self.lose = nn.Dropout(lose)
        self.down = nn.Linear(40, 24) if down else None

    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return y if self.down is None else self.down(self.lose(y))


class Turned(Pair):
    def forward(self, x):
        return self.down(self.up(x) * torch.relu(self.gate(x)))


class Rms(nn.Module):
    """A norm written out."""

    def __init__(self, scale=True):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(24) + 0.5) if scale else None

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y if self.weight is None else self.weight * y


class RmsTurned(Rms):
    def forward(self, x):
        x = x.to(torch.float32)
        return torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-3) * x * self.weight


PAIRS = {
    "silu": Pair,
    "gelu and biases": lambda: Pair(nn.GELU, bias=True),
    "a function": lambda: Pair(nn.functional.silu),
    "no layer after": lambda: Pair(down=False),
    "dropout": lambda: Pair(lose=0.5),
    "turned": Turned,
}


@pytest.mark.parametrize("norm", [Rms, RmsTurned, lambda: Rms(scale=False)])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_gates_and_written_norms(pair, norm, native, tmp_path):
    torch.manual_seed(0)
    model = prune(nn.Sequential(norm(), pair()))
    x = torch.randn(2, 5, 24)
    fast = runtime.compile(model, measure=False, example=(x,))
    assert {*fused_modules(fast)} == {"0", "1"}
    saving.save(fast, tmp_path / "saved")
    odd = x.clone()
    odd[0, 1, 3], odd[1, 2, 0] = float("nan"), float("inf")
    wide = torch.randn(2, 5, 48)[..., ::2]
    for one in (fast, saving.load(tmp_path / "saved", model=model), copy.deepcopy(fast)):
        with torch.inference_mode():
            for given in (x, odd, wide, x[:0], x[0, 0], x[:1, :1]):
                native.clear()
                torch.testing.assert_close(one(given), model(given), rtol=1e-5, atol=1e-5, equal_nan=True)
                assert (native["norm"], native["linear_after"]) == (1, 1)


def test_gates_and_norms_run_as_before_where_the_kernels_do_not_know_them(native):
    torch.manual_seed(0)
    model = prune(nn.Sequential(Rms(), Pair(lose=0.5)))
    x = torch.randn(2, 5, 24)
    fast = runtime.compile(model, measure=False, example=(x,))
    seen = []
    with torch.inference_mode():
        assert fast[0](x.double()).dtype == torch.float64
        handle = fast[1].up.register_forward_hook(lambda *_: seen.append("up"))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert seen == ["up"]
        handle.remove()
        native.clear()
        fast.train()(x)
        assert (native["norm"], native["linear_after"]) == (0, 0)
    assert fast.eval()[0](x).requires_grad  # through the norm's weight
    assert not native["norm"]


def test_what_is_no_gate_and_no_norm():
    class Two(Pair):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.up(x + 1))

    class Sum(Pair):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) + self.up(x))

    class Seen(Pair):
        def forward(self, x):
            opened = self.act(self.gate(x))
            return self.down(opened * self.up(x)) + opened.sum()

    class OverTokens(Rms):
        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6))

    class Cubed(Rms):
        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))

    class Other(Rms):
        def forward(self, x):
            return self.weight * (x.abs() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    class Shifted(Rms):
        def forward(self, x):
            return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    x = torch.randn(2, 5, 24)
    for inner in (Two(), Sum(), Seen(), OverTokens(), Cubed(), Other(), Shifted()):
        torch.manual_seed(0)
        model = prune(nn.Sequential(inner, nn.Linear(24, 24), nn.Tanh()))
        fast = runtime.compile(model, measure=False, example=(x,))
        assert not fused_modules(fast), inner
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_alone_and_a_residual_of_the_input(native):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.act, self.scale = nn.Linear(24, 24), nn.GELU(), nn.LayerNorm(24)

        def forward(self, x):
            return self.scale(self.act(self.mix(x)) + x)

    torch.manual_seed(0)
    model = prune(nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)), Block(), nn.Linear(24, 5)))
    x = torch.randn(3, 7, 24)
    fast = runtime.compile(model, measure=False, example=(x,))
    assert list(fused_modules(fast)) == ["0", "1"]
    with torch.inference_mode():
        native.clear()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert native["linear_after"] == 2


def test_an_activation_that_stays_is_not_lost(monkeypatch):
    def at_few_tokens(array, bias, *, tokens, **_):
        return choosing.FormatChoice({"format": "bitmask"} if tokens == 1 else None, 2.0, 1.0)

    monkeypatch.setattr(compile_model, "choose", at_few_tokens)
    torch.manual_seed(0)
    model = prune(nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.LayerNorm(24)), nn.Linear(24, 24)))
    fast = runtime.compile(model, tokens=(1, 100), example=(torch.randn(3, 24),))
    assert isinstance(fast[0][0], ByTokens)
    assert isinstance(fast[0][1], nn.ReLU)
    plain = runtime.compile(
        prune(Holder(Output())), tokens=(1, 100), example=(torch.randn(2, 5, 24), torch.randn(2, 5, 40))
    )
    assert is_fused(plain)
    with torch.inference_mode():
        for tokens in (1, 90):
            x, residual = torch.randn(tokens, 24), torch.randn(tokens, 40)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
            expected = plain.inner.scale(plain.inner.mix(x) + residual)
            torch.testing.assert_close(plain(x, residual), expected, rtol=1e-5, atol=1e-5)


def test_tracers_and_profilers_see_the_operators():
    _, fast, (x, residual) = fused(Output())
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
    model, fast, _ = fused(Output())
    batches = [(torch.randn(2, 50, 24), torch.randn(2, 50, 40)) for _ in range(2)]
    with torch.inference_mode():
        expected = [model(*batch) for batch in batches]
    barrier, right = threading.Barrier(2), []

    def work(number):
        with torch.inference_mode():
            for _ in range(20):
                barrier.wait(timeout=30)
                right.append(torch.allclose(fast(*batches[number]), expected[number], rtol=1e-5, atol=1e-5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40


def test_operator_passes_torch_checks_and_runs_without_kernels(monkeypatch):
    _, fast, (x, residual) = fused(Output())
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
    torch.manual_seed(0)
    model, batch, _ = bert()
    runtime.save(runtime.compile(prune(model), measure=False, example=batch), tmp_path / "fast")
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
