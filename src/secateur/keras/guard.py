"""Refuses models that are not built, that compute in half precision, or that are spread over devices."""

from typing import Any

import keras

from secateur.errors import ModelError
from secateur.keras.naming import layers, own_variables

BACKENDS = ("tensorflow", "torch")
PRECISE = ("float32", "float64")


def check_model(model: keras.Model) -> None:
    """Raise ModelError with one sentence when the model cannot be pruned here."""
    if keras.backend.backend() not in BACKENDS:
        raise ModelError(
            f"the Keras backend is {keras.backend.backend()}; set KERAS_BACKEND to {' or '.join(BACKENDS)} and start "
            "again"
        )
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"a {type(model).__module__}.{type(model).__name__} is no Keras 3 model; make it with keras or tf.keras of "
            "TensorFlow 2.16 or later"
        )
    if not model.built or any(not layer.built for _, layer in layers(model) if own_variables(layer)):
        raise ModelError(
            f"{model.name} is not built, so its weights have no shapes; call it on a batch, "
            "`model.build(input_shape)`, or pass example="
        )
    if getattr(model, "_distribute_strategy", None) is not None or keras.distribution.distribution() is not None:
        raise ModelError(
            f"{model.name} was made under a distribution strategy, whose mirrored weights are not pruned here; make it "
            "outside of the strategy's scope and load its weights"
        )
    for path, layer in [(model.name, model), *layers(model)]:
        policy = layer.dtype_policy
        if policy.compute_dtype not in PRECISE or policy.variable_dtype not in PRECISE:
            raise ModelError(
                f"{path} has the policy {policy.name}, whose rounding is larger than what verify permits; rebuild the "
                "model with the policy float32, copy its weights with set_weights, and set the policy again afterwards"
            )


def check_inputs(inputs: Any) -> None:
    """Raise ModelError when no input of the model is known."""
    if inputs is None:
        raise ModelError("the inputs of a subclassed model are not known; pass example= (one batch) to secateur.open")
