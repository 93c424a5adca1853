import numpy as np
import pytest

from secateur.budget import OWL, Entries, Global, PerKind, Threshold, Uniform, allocate, outliers, owl
from secateur.errors import PlanError
from secateur.layout import Layout
from secateur.select import NM, Block, Element, Unit, parse_pattern, resolve_axes, select_units, select_weights, top

from .fake import TEXT

LAYOUT = Layout.from_text(TEXT)
RNG = np.random.default_rng(0)


def test_top_breaks_ties_by_position():
    assert top(np.array([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [False, True, True, False, False]
    assert top(np.array([1.0, 2.0]), 0).tolist() == [False, False]
    assert top(np.array([1.0, 2.0]), 5).tolist() == [True, True]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.999])
def test_global_meets_the_count_to_the_last_weight(sparsity):
    scores = {"a": RNG.integers(0, 5, size=(30, 7)).astype(float), "b": RNG.normal(size=(11, 13))}
    masks = select_weights(scores, {"a": 1, "b": 1}, Element(), Global(sparsity))
    zeros = sum(int((~m).sum()) for m in masks.values())
    assert zeros == round(sparsity * (30 * 7 + 11 * 13))
    removed = np.concatenate([np.abs(scores[k])[~masks[k]] for k in masks])
    stayed = np.concatenate([np.abs(scores[k])[masks[k]] for k in masks])
    assert not len(removed) or not len(stayed) or removed.max() <= stayed.min()


def test_uniform_is_the_same_share_everywhere():
    scores = {"a": RNG.normal(size=(10, 10)), "b": 100 * RNG.normal(size=(4, 5))}
    masks = select_weights(scores, {"a": 1, "b": 1}, Element(), Uniform(0.2))
    assert masks["a"].sum() == 80
    assert masks["b"].sum() == 16


def test_threshold_is_the_literal_form():
    weight = np.array([[0.1, -0.2, 0.3, -0.4]])
    masks = select_weights({"w": weight}, {"w": 1}, Element(), Threshold(0.2))
    assert masks["w"].tolist() == [[False, False, True, True]]
    with pytest.raises(PlanError, match=r"threshold 5 would empty w, whose largest score is 0.4"):
        select_weights({"w": weight}, {"w": 1}, Element(), Threshold(5.0))


@pytest.mark.parametrize("in_dim", [0, 1])
def test_nm_keeps_the_largest_of_every_group_of_inputs(in_dim):
    scores = RNG.normal(size=(8, 12))
    stored = scores if in_dim == 1 else scores.T
    mask = select_weights({"w": stored}, {"w": in_dim}, NM(2, 4), None)["w"]
    mask = mask if in_dim == 1 else mask.T
    groups = mask.reshape(8, 3, 4)
    assert (groups.sum(-1) == 2).all()
    for row in range(8):
        for group in range(3):
            values = np.abs(scores[row, 4 * group : 4 * group + 4])
            assert set(np.flatnonzero(groups[row, group])) == set(np.argsort(-values)[:2])


def test_blocks_go_whole():
    mask = select_weights({"w": RNG.normal(size=(8, 6))}, {"w": 1}, Block(4, 2), Uniform(0.5))["w"]
    blocks = mask.reshape(2, 4, 3, 2).sum((1, 3))
    assert set(blocks.reshape(-1).tolist()) == {0, 8}
    assert (blocks == 8).sum() == 3


def test_sizes_that_a_pattern_does_not_divide_are_refused():
    with pytest.raises(PlanError, match="w has 6 inputs, not a multiple of 4"):
        select_weights({"w": np.ones((8, 6))}, {"w": 1}, NM(2, 4), None)
    with pytest.raises(PlanError, match="w is 8 x 6, which blocks of 3x1 do not divide"):
        select_weights({"w": np.ones((8, 6))}, {"w": 1}, Block(3, 1), Uniform(0.5))


def test_stacked_experts_are_ranked_as_rows():
    scores = RNG.normal(size=(3, 4, 5))  # (expert, in, out)
    mask = select_weights({"w": scores}, {"w": 1}, NM(1, 2), None)["w"]
    assert mask.shape == scores.shape
    assert (mask.reshape(3, 2, 2, 5).sum(2) == 1).all()


def test_query_heads_stay_equal_in_every_group():
    scores = {"L0.head": np.array([9.0, 8.0, 1.0, 2.0])}
    keep = select_units(LAYOUT, scores, {"L0.head": 1.0}, Uniform(0.5))
    assert keep["L0.head"].tolist() == [0, 3]


def test_global_units_weigh_cost_and_keep_one():
    scores = {"L0.ffn": np.full(8, 0.001), "L0.kv": np.array([5.0, 1.0])}
    keep = select_units(LAYOUT, scores, {"L0.ffn": 1.0, "L0.kv": 10.0}, Global(0.6))
    assert len(keep["L0.ffn"]) == 1
    assert keep["L0.kv"].tolist() == [0, 1]  # 7 of 28 are gone, and the next unit would exceed 0.6


def test_per_kind_ranks_within_each_kind():
    entries = {
        "a": Entries(np.array([1.0, 2.0, 3.0, 4.0]), "ffn"),
        "b": Entries(np.array([5.0, 6.0, 7.0, 8.0]), "ffn"),
        "c": Entries(np.array([0.1, 0.2]), "head"),
    }
    assert allocate(PerKind(0.5), entries) == {"a": 0, "b": 4, "c": 1}
    assert allocate(PerKind({"head": 0.5}), entries) == {"a": 4, "b": 4, "c": 1}
    with pytest.raises(PlanError, match="no kind 'neuron' among what is pruned; there is ffn, head"):
        allocate(PerKind({"neuron": 0.5}), entries)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 7, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(PlanError, match=r"outside \[0, 1\)"):
        allocate(Uniform(sparsity), {"a": Entries(np.ones(3))})


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("element", Element()), ("2:4", NM(2, 4)), ("4x1", Block(4, 1)), ("head,ffn", Unit("head", "ffn"))],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize("text", ["4:4", "0:4", "", "0x3", "2:4:8", "a b"])
def test_patterns_that_are_refused(text):
    with pytest.raises(PlanError):
        parse_pattern(text)


def test_units_that_cannot_be_pruned_say_why():
    assert [a.name for a in resolve_axes(LAYOUT, Unit("head", "L0.kv"))] == ["L0.head", "L0.kv"]
    with pytest.raises(PlanError, match="axis hidden cannot be pruned \\(frozen: residual stream\\)"):
        resolve_axes(LAYOUT, Unit("hidden"))
    with pytest.raises(PlanError, match="no axis or kind 'expert'; it has kv"):
        resolve_axes(LAYOUT, Unit("expert"))


def test_owl_by_hand():
    found = owl(np.array([0.02, 0.06, 0.04]), 0.7, 0.08)
    np.testing.assert_allclose(found, [0.7 + 0.08, 0.7 - 0.08, 0.7])
    np.testing.assert_allclose(owl(np.array([1.0, 1.0]), 0.5), [0.5, 0.5])
    sizes = np.array([1, 3])
    assert np.average(owl(np.array([0.0, 1.0]), 0.5, sizes=sizes), weights=sizes) == pytest.approx(0.5)
    with pytest.raises(PlanError, match="lower the spread"):
        owl(np.array([0.0, 1.0]), 0.95)
    assert outliers(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 14.0])) == pytest.approx(0)
    assert outliers(np.array([1.0] * 9 + [30.0])) == pytest.approx(0.1)


def test_owl_keeps_more_where_outliers_are_and_meets_the_count():
    plain, outlying = RNG.random((2, 500)) + 1
    outlying[:20] = 500
    entries = {"a": Entries(plain, "L0"), "b": Entries(outlying, "L1"), "c": Entries(plain[:251], "L1")}
    kept = allocate(OWL(0.7), entries)
    assert sum(kept.values()) == 1251 - round(0.7 * 1251)
    assert kept["b"] / 500 > 0.3 > kept["a"] / 500
    assert abs(kept["c"] / 251 - kept["b"] / 500) < 0.01
