import numpy as np
import pytest

from secateur import criteria, pruning, repair
from secateur.budget import OWL, Global, Threshold
from secateur.cost import macs, parameters, unit_parameters
from secateur.errors import DataError, ModelError, PlanError
from secateur.plan import Plan
from secateur.pruning import default_weights, kind_of, needs_of, prune
from secateur.select import NM, Element, Unit
from secateur.stats import Stats, Tally

from .fake import FakeHost


def test_only_linear_weights_of_layers_count():
    host = FakeHost()
    assert "head.weight" not in default_weights(host.layout)
    assert len(default_weights(host.layout)) == 4
    assert kind_of(host.layout, "layers.0.v.weight") == "kv"
    assert kind_of(host.layout, "layers.0.down.weight") == "ffn"
    assert kind_of(host.layout, "head.weight") == "hidden"


def test_magnitude_needs_no_data_and_meets_the_sparsity():
    host = FakeHost()
    plan = prune(host, criteria.magnitude, Element(), Global(0.75))
    weights = sum(host.arrays[p].size for p in default_weights(host.layout))
    assert sum(int((~m).sum()) for m in plan.masks.values()) == round(0.75 * weights)
    assert plan.provenance["counted"] == {"tensors": 4, "weights": weights}
    assert host.collected == []


def test_taylor_of_a_unit_is_the_absolute_sum():
    host = FakeHost()
    plan = prune(host, criteria.taylor, Unit("ffn"), 0.5, data=[1, 2])
    stats = host.collect(["grad"], [1, 2])
    contribution = {p: host.arrays[p] * stats.mean("grad", p) for p in host.layout.params}
    scores = np.abs(
        contribution["layers.0.up.weight"].sum(1)
        + contribution["layers.0.up.bias"]
        + contribution["layers.0.down.weight"].sum(0)
    )
    assert plan.keep["L0.ffn"].tolist() == sorted(np.argsort(-scores)[:4].tolist())
    assert plan.sizes == {"L0.ffn": 8}


def test_attention_scores_of_query_heads_add_up_for_a_group():
    host = FakeHost()
    tally = Tally()
    tally.add("attn_mass", "L0.head", np.array([1.0, 2.0, 10.0, 20.0]), 2.0)
    plan = prune(host, criteria.attention_mass, Unit("kv"), 0.5, stats=tally.stats())
    assert plan.keep["L0.kv"].tolist() == [1]


def test_errors_of_the_walk():
    host = FakeHost()
    with pytest.raises(DataError, match="criterion taylor needs grad; pass data"):
        prune(host, criteria.taylor, Element(), 0.5)
    with pytest.raises(PlanError, match="scores units, not weights"):
        prune(
            host, criteria.attention_mass, Element(), 0.5, stats=Stats({"attn_mass": {"a": 1}}, {"attn_mass": {"a": 1}})
        )
    with pytest.raises(PlanError, match="needs a sparsity or a threshold"):
        prune(host, criteria.magnitude, Unit("ffn"))
    with pytest.raises(PlanError, match="no linear weight matches nothing"):
        prune(host, criteria.magnitude, Element(), 0.5, weights=["nothing"])
    host.arrays["layers.0.up.weight"][0, 0] = np.nan
    with pytest.raises(ModelError, match="layers.0.up.weight holds NaN"):
        prune(host, criteria.magnitude, Element(), 0.5)


def test_nan_gradients_are_refused():
    host = FakeHost()
    tally = Tally()
    for param in host.layout.params:
        tally.add("grad", param, np.full(host.layout.shape(param), np.nan), 1)
    with pytest.raises(DataError, match="grad of .* is NaN"):
        prune(host, criteria.gradient, Element(), 0.5, stats=tally.stats())


def test_a_criterion_with_an_unknown_need():
    def strange(weight, phase):
        return weight

    with pytest.raises(PlanError, match="criterion strange asks for 'phase'"):
        needs_of(strange)


def test_costs():
    host = FakeHost()
    dense = parameters(host.layout)
    assert dense.total == dense.nonzero == sum(a.size for a in host.arrays.values())
    plan = Plan(keep={"L0.ffn": np.arange(4), "L0.head": np.array([0, 2])}).check(host.layout)
    assert parameters(host.layout, plan).total == dense.total - 4 * 9 - 2 * 12
    assert macs(host.layout) == 10 * 32 + 10 * 48 + 7 * 4
    assert macs(host.layout, plan) == 10 * 16 + 10 * 24 + 7 * 2
    assert unit_parameters(host.layout, "L0.ffn") == 9
    assert unit_parameters(host.layout, "L0.head") == 12
    mask = prune(host, criteria.magnitude, NM(1, 2))
    assert parameters(host.layout, mask).nonzero == dense.total - sum(m.size // 2 for m in mask.masks.values())


def test_a_removed_layer_costs_nothing():
    host = FakeHost()
    plan = Plan(keep={"layers": np.array([], dtype=int)}).check(host.layout)
    assert parameters(host.layout, plan).total == 8
    assert macs(host.layout, plan) == 0


@pytest.mark.parametrize("repair", [None, repair.sparsegpt])
def test_a_budget_that_a_pattern_cannot_follow(repair):
    host = FakeHost()
    criterion = criteria.magnitude if repair is None else None
    for budget in (0.9, Global(0.5), Threshold(0.1)):
        with pytest.raises(PlanError, match=r"pattern 1:4 is its own budget \(0\.75 zeros\); leave out "):
            prune(host, criterion, NM(1, 4), budget, data=[1], repair=repair)
    assert host.collected == []
    if repair is None:
        same = [prune(host, criteria.magnitude, NM(1, 2), budget).masks for budget in (0.5, None)]
        assert all((same[0][name] == same[1][name]).all() for name in same[0])
        with pytest.raises(
            PlanError, match="OWL deals a sparsity out by the outliers among single weights, not to units"
        ):
            prune(host, criteria.magnitude, Unit("ffn"), OWL(0.5, spread=0.3))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_scores_as_the_same_numbers_in_float32(kind):
    torch = pytest.importorskip("torch")
    host, single = FakeHost(), FakeHost()
    host.arrays = {name: torch.tensor(a * 1e-3).to(getattr(torch, kind)) for name, a in host.arrays.items()}
    single.arrays = {name: a.float() for name, a in host.arrays.items()}
    ffn = host.layout.axis("L0.ffn")
    for criterion in (criteria.magnitude, criteria.brain_damage):
        stats = Stats()
        if criterion is criteria.brain_damage:
            sums = {name: torch.ones(a.shape) for name, a in single.arrays.items()}
            stats = Stats({"grad_sq": sums}, {"grad_sq": dict.fromkeys(sums, 1)})
        scores = pruning.unit_scores(host, criterion, ffn, stats)
        np.testing.assert_array_equal(scores, pruning.unit_scores(single, criterion, ffn, stats))
        assert len(np.unique(scores)) == ffn.size
        name = "layers.0.up.weight"
        np.testing.assert_array_equal(
            pruning.weight_scores(host, criterion, name, stats), pruning.weight_scores(single, criterion, name, stats)
        )
