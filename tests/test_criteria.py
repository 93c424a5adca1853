import array_api_compat
import numpy as np
import pytest

from secateur import criteria
from secateur.criteria.magnitude import threshold

torch = pytest.importorskip("torch")
W = np.array([[0.5, -2.0, 0.0], [1.0, -0.1, 3.0]])
G = np.array([[1.0, 0.5, 9.0], [-1.0, -2.0, 0.0]])


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
