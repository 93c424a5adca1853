"""Outputs of Keras models in every form: all are compared, in `verify` and in the parity of a program."""

import keras
import numpy as np
import pytest

import secateur
from secateur.check import VerifyError
from secateur.deploy.jobs import keras_jobs
from secateur.errors import ModelError
from secateur.plan import Plan

X = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
PORTS = [{"name": "x"}]


def model_of(form):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="x")
    hidden = keras.layers.Dense(12, activation="relu", name="up")(inputs)
    return keras.Model(inputs, form(keras.layers.Dense(3, name="down")(hidden)))


def shifted(model, by):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    bias = other.get_layer("down").bias
    bias.assign(bias + np.array([0, by, 0], "float32"))
    return other


def wrong(host, by):
    """A host whose copies err by so much in one class once they are shrunk."""
    copied = host.copy

    def copy():
        other = copied()
        resize = other.resize

        def resize_and_err(plan):
            resize(plan)
            other.write("down.bias", np.asarray(other.read("down.bias")) + np.array([0, by, 0], "float32"))

        other.resize = resize_and_err
        return other

    host.copy = copy
    return host


FORMS = {
    "one": lambda y: y,
    "a list of one": lambda y: [y],
    "a dict": lambda y: {"z": y, "a": y * 2},
    "integers": lambda y: keras.ops.cast(y * 1000, "int32"),
    "beside -1e9": lambda y: keras.ops.concatenate([y[:, :2], y[:, 2:] * 0 - 1e9], 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_wrong_number_is_found(form):
    model = model_of(form)
    host = secateur.open(model, X)
    axis = host.layout.of_kind("ffn")[0].name
    plan = Plan({axis: np.arange(5)})
    assert secateur.verify(wrong(host, 0.0), plan, [X]).difference <= 1e-6
    with pytest.raises(VerifyError, match="outputs differ by"):
        secateur.verify(wrong(host, 0.5), plan, [X])

    def program(by):
        other = shifted(model, by)

        def run(feed):
            flat = keras.tree.flatten(other(feed["x"]))
            return {f"any_{i}": np.asarray(keras.ops.convert_to_numpy(array)) for i, array in enumerate(flat)}

        return run

    assert keras_jobs.compare(model, program(0.0), PORTS, [{"x": X}], 1e-6).relative_error == 0.0
    with pytest.raises(ModelError, match="differs from Keras by .* of its output_0"):
        keras_jobs.compare(model, program(0.5), PORTS, [{"x": X}], 1e-4)


def test_other_outputs_of_a_program():
    model = model_of(lambda y: y)
    answers = np.asarray(keras.ops.convert_to_numpy(model(X)))
    for given, said in (
        ({}, r"gives output_0 as None, Keras as \(5, 3\)"),
        ({"a": answers, "b": answers}, r"gives output_1 as \(5, 3\), Keras as None"),
        ({"a": answers[:, :2]}, r"gives output_0 as \(5, 2\), Keras as \(5, 3\)"),
        ({"a": answers * np.nan}, "differs from Keras by inf"),
    ):
        with pytest.raises(ModelError, match=said):
            keras_jobs.compare(model, lambda feed, given=given: given, PORTS, [{"x": X}], 1e-4)
