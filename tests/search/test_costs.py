"""Costs: exact against `secateur.cost` on random candidates of several families; measured ones by hand."""

import numpy as np
import pytest

import secateur
from secateur.cost import Curve, LatencyTable, macs, parameters
from secateur.errors import TargetError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.search.candidate import Candidate, layer_of_axes
from secateur.search.costs import (
    allowed_sizes,
    bytes_cost,
    costs_of,
    latency_cost,
    macs_cost,
    memory_cost,
    params_cost,
    rounded,
    widths_of,
)
from secateur.search.target import Call, Limit, make_target
from secateur.torch.data.example import example_for
from tests import zoo

ONNX = Call("onnx")


@pytest.fixture(scope="module", params=["bert", "llama", "t5", "vit", "gpt2"])
def layout(request):
    model = zoo.build(request.param)
    return secateur.open(model, example_for(model)).layout


def random_candidate(layout, rng):
    """Any sizes, and up to all but one of the layers; axes of layers that go are not named."""
    dropped = {
        outer.name: tuple(np.sort(rng.choice(outer.size, rng.integers(0, outer.size), replace=False)).tolist())
        for outer in layout.of_kind("layer")
    }
    inside = layer_of_axes(layout)
    gone = {axis for axis, (outer, layer) in inside.items() if layer in dropped.get(outer, ())}
    kept = {name: int(rng.choice(sizes)) for name, sizes in allowed_sizes(layout, 1).items() if name not in gone}
    return Candidate(kept, dropped)


def plan_of(layout, candidate):
    keep = {axis: np.arange(count) for axis, count in candidate.kept.items()}
    for outer, gone in candidate.dropped.items():
        keep[outer] = np.setdiff1d(np.arange(layout.axis(outer).size), gone)
    return Plan(keep)


def test_parameters_and_products_add_up(layout):
    rng = np.random.default_rng(0)
    by_params, by_macs = params_cost(layout, Limit("params", 0.5)), macs_cost(layout, Limit("macs", 0.5))
    assert (by_params.dense, by_macs.dense) == (parameters(layout).total, macs(layout))
    assert by_params.of(Candidate()) == by_macs.of(Candidate()) == 1.0
    for _ in range(10):
        candidate = random_candidate(layout, rng)
        plan = plan_of(layout, candidate)
        assert by_params.of(candidate) == pytest.approx(parameters(layout, plan).total / by_params.dense)
        assert by_macs.of(candidate) == pytest.approx(macs(layout, plan) / by_macs.dense)


def test_every_axis_that_is_searched_has_a_curve_that_ends_at_zero(layout):
    cost = params_cost(layout, Limit("params", 0.5))
    assert set(cost.curves) == set(cost.allowed) != set()
    for axis, curve in cost.curves.items():
        assert len(curve) == layout.axis(axis).size + 1
        assert curve[-1] == 0.0
        assert (np.diff(curve) > 0).all()


LAYERED = Layout.from_text("""
axes
  hidden 4 hidden
  L0.head 2 head
  L1.head 2 head
  L0.ffn 6 ffn
  L1.ffn 3 ffn
  layers 2 layer @ layers
parameters
  embed : hidden
  layers.0.o : hidden L0.head < a 1
  layers.0.up : L0.ffn hidden < b 1
  layers.1.o : hidden L1.head < c 1
  layers.1.up : L1.ffn hidden < d 1
products
  5 layers.0.o : hidden L0.head
  7 - : L0.head
  5 layers.0.up : L0.ffn hidden
  5 layers.1.o : hidden L1.head
  7 - : L1.head
  5 layers.1.up : L1.ffn hidden
""")


def test_a_layer_goes_with_its_attention():
    """Dense: 4 + (8 + 24) + (8 + 12) = 56 parameters; products 5 * 52 of weights and 7 * 4 of activations."""
    first = Candidate(dropped={"layers": (0,)})
    assert params_cost(LAYERED, Limit("params", 0.5)).of(first) == pytest.approx(24 / 56)
    assert macs_cost(LAYERED, Limit("macs", 0.5)).of(first) == pytest.approx((5 * 20 + 14) / 288)
    assert macs(LAYERED, Plan({"layers": np.array([1])})) == 5 * 20 + 14
    second = Candidate({"L0.ffn": 1}, {"layers": (1,)})
    assert params_cost(LAYERED, Limit("params", 0.5)).of(second) == pytest.approx((4 + 8 + 4) / 56)


def test_bytes_follow_the_width_of_each_weight():
    widths = {"embed": 4, "layers.0.o": 2, "layers.0.up": 2, "layers.1.o": 4, "layers.1.up": 4}
    cost = bytes_cost(LAYERED, Limit("bytes", 80.0, relative=False), widths)
    assert cost.dense == 16 + 64 + 80
    assert cost.bound == 0.5
    assert cost.of(Candidate({"L0.ffn": 1})) == pytest.approx((160 - 5 * 4 * 2) / 160)
    assert cost.of(Candidate(dropped={"layers": (0,)})) == pytest.approx(96 / 160)


def test_memory_keeps_what_the_runtime_itself_takes():
    """Half of the axes takes away 14 + 16 = 26 of 56 numbers, 104 bytes; the process loses 208, so a byte costs two."""
    widths = dict.fromkeys(LAYERED.params, 4)
    half = (LAYERED.axis("L0.head").size // 2, LAYERED.axis("L0.ffn").size // 2, LAYERED.axis("L1.ffn").size // 2)
    gone = 4 * 4 * (2 * (2 - half[0]) + (6 - half[1]) + (3 - half[2]))
    cost = memory_cost(LAYERED, Limit("memory", 0.9, call=ONNX), (1000, 1000 - 2 * gone), widths)
    assert cost.dense == 1000
    assert cost.of(Candidate({"L0.ffn": 5})) == pytest.approx(1 - 2 * 16 / 1000)
    assert cost.of(Candidate(dropped={"layers": (0,)})) == pytest.approx(1 - 2 * 128 / 1000)


def test_memory_that_does_not_shrink_is_all_rest():
    cost = memory_cost(LAYERED, Limit("memory", 0.9, call=ONNX), (1000, 1010), dict.fromkeys(LAYERED.params, 4))
    assert cost.of(Candidate({"L0.ffn": 1})) == 1.0


TABLE = LatencyTable(
    "onnx",
    1,
    128,
    1,
    20.0,
    {
        "head": Curve((1, 2), (-0.1, 0.0)),
        "ffn": Curve((2, 4, 6), (-0.2, -0.05, 0.0)),
        "small": Curve((1, 3), (-0.02, 0.0)),
    },
    {"L0.head": "head", "L1.head": "head", "L0.ffn": "ffn", "L1.ffn": "small"},
    layers={"layers": -0.4},
)


def test_latency_is_read_off_a_table():
    cost = latency_cost(TABLE, Limit("latency", 5.0, relative=False, call=ONNX), LAYERED)
    assert (cost.dense, cost.bound) == (20.0, 0.25)
    np.testing.assert_allclose(cost.curves["L0.ffn"], [-0.35, -0.275, -0.2, -0.125, -0.05, -0.025, 0.0], atol=1e-12)
    assert cost.of(Candidate({"L1.head": 1, "L1.ffn": 2}, {"layers": (0,)})) == pytest.approx(1 - 0.4 - 0.1 - 0.01)


def test_wide_axes_come_in_steps():
    layout = Layout.from_text(
        "axes\n  a 12 head\n  b 100 ffn\n  c 128 ffn\n  d 200 ffn multiple 24\n  e 12 kv multiple 4\nparameters\n"
        + "".join(f"  {name} : {name}\n" for name in "abcde")
    )
    allowed = allowed_sizes(layout)
    assert allowed["a"].tolist() == list(range(1, 13))
    assert allowed["b"].tolist() == list(range(1, 101))
    assert allowed["c"].tolist() == [16, 32, 48, 64, 80, 96, 112, 128]
    assert allowed["d"].tolist() == [48, 96, 144, 192, 200]
    assert allowed["e"].tolist() == [4, 8, 12]
    assert allowed_sizes(layout, 8)["b"].tolist() == [*range(8, 100, 8), 100]


def test_neurons_are_rounded_and_heads_are_not():
    text = "axes\n  a 12 head\n  b 100 ffn\n  c 24 ffn\nparameters\n  a : a\n  b : b\n  c : c\n"
    layout = Layout.from_text(text)
    cost = rounded(params_cost(layout, Limit("params", 0.5)), layout, 32)
    assert cost.allowed["a"].tolist() == list(range(1, 13))
    assert cost.allowed["b"].tolist() == [32, 64, 96, 100]
    assert cost.allowed["c"].tolist() == [24]  # fewer than one multiple: it stays whole
    with pytest.raises(TargetError, match="multiples of at least 1, not of 0"):
        make_target(limits=["params<=50%"], round=0)


def test_every_limit_of_a_target_has_its_cost():
    model = zoo.build("bert")
    host = secateur.open(model, example_for(model))
    target = make_target(limits=["params<=50%", "macs<=40%", "bytes<=10kB", "latency<=2ms@onnx"])
    axes = dict.fromkeys(allowed_sizes(host.layout), "all")
    table = LatencyTable("onnx", 1, 128, 1, 4.0, {"all": Curve((1, 48), (-0.1, 0.0))}, axes)
    costs = costs_of(target, host, tables={Call("onnx"): table})
    assert [cost.limit for cost in costs] == list(target.limits)
    total = parameters(host.layout).total
    assert [cost.bound for cost in costs] == pytest.approx([0.5, 0.4, 1e4 / (4 * total), 0.5])
    assert set(widths_of(host).values()) == {4}


def test_a_target_without_limits_has_the_latency_of_its_call():
    host = type("Host", (), {"layout": LAYERED})()
    (cost,) = costs_of(make_target(on="onnx", max_drop=0.01), host, tables={ONNX: TABLE})
    assert (cost.limit.quantity, cost.bound, cost.dense) == ("latency", 1.0, 20.0)
