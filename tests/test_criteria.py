import array_api_compat
import numpy as np
import pytest

from secateur import criteria
from secateur.criteria.magnitude import threshold
from secateur.pruning import needs_of
from secateur.stats import OF_AXIS

torch = pytest.importorskip("torch")
W = np.array([[0.5, -2.0, 0.0], [1.0, -0.1, 3.0]])
G = np.array([[1.0, 0.5, 9.0], [-1.0, -2.0, 0.0]])

OF_WEIGHTS = {"magnitude": 1, "wanda": 1, "taylor": 1, "brain_damage": 2, "gradient": 0, "ria": 0}
"""Criterion of weights -> its degree of homogeneity in them: f(c w) = |c|^degree f(w), up to the sign."""
OF_UNITS = [name for name in criteria.__all__ if name not in (*OF_WEIGHTS, "threshold")]
NAMES = [*OF_WEIGHTS, *OF_UNITS]


def inputs_of(name):
    """Random arguments of a criterion: weights are 4 x 6, units are 6, squares are positive."""
    rng = np.random.default_rng(0)
    shapes = {"weight": (4, 6), "grad": (4, 6), "grad_sq": (4, 6), "act_sq": (1, 6)}
    needs = needs_of(getattr(criteria, name))
    return {n: rng.normal(size=shapes.get(n, (6,))) ** (1 if n in ("weight", "grad") else 2) for n in needs}


@pytest.mark.parametrize("to", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_values_by_hand(to):
    w, g = to(W), to(G)
    assert np.asarray(criteria.magnitude(w)).tolist() == [[0.5, 2.0, 0.0], [1.0, 0.1, 3.0]]
    assert np.asarray(criteria.gradient(g)).tolist() == [[1.0, 0.5, 9.0], [1.0, 2.0, 0.0]]
    assert np.asarray(criteria.taylor(w, g)).tolist() == [[0.5, -1.0, 0.0], [-1.0, 0.2, 0.0]]
    assert np.asarray(criteria.brain_damage(w, g)).tolist()[0] == [0.125, 1.0, 0.0]
    np.testing.assert_allclose(np.asarray(criteria.wanda(w, to(np.array([[4.0, 1.0, 9.0]]))))[1], [2.0, 0.1, 9.0])
    cut = threshold(w, 0.5)
    assert np.asarray(cut).tolist() == [[0.0, -2.0, 0.0], [1.0, 0.0, 3.0]]
    assert array_api_compat.is_torch_array(cut) == array_api_compat.is_torch_array(w)
    np.testing.assert_allclose(np.asarray(criteria.attention_entropy(to(np.array([0.0, np.log(4)])))), [1.0, 0.25])


def test_unit_criteria_pass_their_quantity_through():
    x = np.array([0.2, 0.1])
    for criterion in (criteria.fisher, criteria.activation, criteria.attention_mass, criteria.attention_output):
        assert criterion(x) is x


def test_routed_saliency_is_a_mean_over_the_tokens_of_each_expert_by_hand():
    saliency = criteria.routed_saliency(np.array([0.6, 0.6, 0.0]), np.array([0.5, 0.25, 0.0]))
    np.testing.assert_allclose(saliency, [1.2, 2.4, 0.0])


def test_ria_by_hand():
    weight = np.array([[1.0, 3.0], [2.0, -2.0], [0.0, 0.0]])  # columns sum to 3 and 5, rows to 4, 4 and 0
    scores = [[2 * (1 / 3 + 1 / 4), 3 / 5 + 3 / 4], [2 * (2 / 3 + 2 / 4), 2 / 5 + 2 / 4], [0.0, 0.0]]
    np.testing.assert_allclose(criteria.ria(weight, np.array([[16.0, 1.0]])), scores)
    np.testing.assert_allclose(criteria.ria(weight, np.array([[4.0, 1.0]]), power=1.0), scores)


def test_units_are_scored_by_quantities_of_units():
    assert all(set(needs_of(getattr(criteria, name))) <= set(OF_AXIS) for name in OF_UNITS)
    assert not any(set(needs_of(getattr(criteria, name))) & set(OF_AXIS) for name in OF_WEIGHTS)


@pytest.mark.parametrize("name", NAMES)
def test_permuted_rows_columns_and_units_have_permuted_scores(name):
    rows, columns = np.random.default_rng(1).permutation(4), np.random.default_rng(2).permutation(6)

    def permuted(array):
        return array[..., columns] if array.ndim == 1 or len(array) == 1 else array[rows][:, columns]

    criterion, inputs = getattr(criteria, name), inputs_of(name)
    expected = permuted(criterion(**inputs))
    np.testing.assert_allclose(criterion(**{n: permuted(x) for n, x in inputs.items()}), expected, rtol=1e-12)


@pytest.mark.parametrize("factor", [3.0, -0.5])
@pytest.mark.parametrize("name", NAMES)
def test_scaled_weights_have_scaled_scores(name, factor):
    criterion, inputs = getattr(criteria, name), inputs_of(name)
    scaled = {n: factor * x if n == "weight" else x for n, x in inputs.items()}
    expected = abs(factor) ** OF_WEIGHTS.get(name, 0) * np.abs(criterion(**inputs))
    np.testing.assert_allclose(np.abs(criterion(**scaled)), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in OF_WEIGHTS if name != "gradient"])
def test_a_larger_weight_has_a_larger_score(name):
    criterion, inputs = getattr(criteria, name), inputs_of(name)
    for row, column in np.ndindex(4, 6):
        larger = inputs["weight"].copy()
        larger[row, column] *= 1.1
        before, after = (np.abs(criterion(**{**inputs, "weight": w}))[row, column] for w in (inputs["weight"], larger))
        assert after > before


def test_criteria_of_units_rank_as_their_quantity_but_entropy_the_other_way():
    for name in set(OF_UNITS) - {"routed_saliency"}:
        ((_, values),) = inputs_of(name).items()
        order = np.argsort(-values if name == "attention_entropy" else values)
        assert np.argsort(getattr(criteria, name)(values)).tolist() == order.tolist()
