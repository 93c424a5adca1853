"""Gates of feed-forward layers and norms that are written out, fused into the kernels' calls."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from secateur import runtime
from secateur.kernels.native import load_native
from secateur.runtime import saving
from tests import zoo
from tests.runtime.checks import fused_modules

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


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
def test_gates_and_written_norms(pair, norm, calls, tmp_path):
    model = zoo.plain(lambda: nn.Sequential(norm(), pair()))
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
                calls.clear()
                torch.testing.assert_close(one(given), model(given), rtol=1e-5, atol=1e-5, equal_nan=True)
                assert (calls["norm"], calls["linear_after"]) == (1, 1)


def test_gates_and_norms_run_as_before_where_the_kernels_do_not_know_them(calls):
    model = zoo.plain(lambda: nn.Sequential(Rms(), Pair(lose=0.5)))
    x = torch.randn(2, 5, 24)
    fast = runtime.compile(model, measure=False, example=(x,))
    seen = []
    with torch.inference_mode():
        assert fast[0](x.double()).dtype == torch.float64
        handle = fast[1].up.register_forward_hook(lambda *_: seen.append("up"))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert seen == ["up"]
        handle.remove()
        calls.clear()
        fast.train()(x)
        assert (calls["norm"], calls["linear_after"]) == (0, 0)
    assert fast.eval()[0](x).requires_grad  # through the norm's weight
    assert not calls["norm"]


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
    for inner in (Two, Sum, Seen, OverTokens, Cubed, Other, Shifted):
        model = zoo.plain(lambda inner=inner: nn.Sequential(inner(), nn.Linear(24, 24), nn.Tanh()))
        fast = runtime.compile(model, measure=False, example=(x,))
        assert not fused_modules(fast), inner
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
