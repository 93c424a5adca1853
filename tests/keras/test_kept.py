"""Keras models and artefacts that earlier code wrote still load, and give the numbers that they gave."""

from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import secateur
from secateur.deploy import runner

PLACES = sorted((Path(__file__).parents[1] / "kept").glob("*/keras"))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.parent.name)
def test_models(place):
    tensors = load_file(place / "numbers.safetensors")
    model = secateur.open(place / "model").model
    answer = keras.ops.convert_to_numpy(model(tensors["ids"]))
    np.testing.assert_allclose(answer, tensors["answer"], rtol=0, atol=1e-5)
    plan = secateur.Plan.load(place / "model")
    assert plan.masks


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow brings the runtime")
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.parent.name)
def test_artefacts(place):
    tensors = load_file(place / "numbers.safetensors")
    (found,) = runner.load(place / "artefact")({"ids": tensors["ids"]}).values()
    np.testing.assert_allclose(found, tensors["answer"], rtol=0, atol=1e-5)
