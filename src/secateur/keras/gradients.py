"""Gradients of the loss with respect to weights, on the TensorFlow and the torch backend."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from secateur.errors import DataError
from secateur.keras.batches import unpack

Loss = Callable[[Any, Any], Any]
"""`loss(y, outputs) -> scalar`, the mean over the batch."""


def loss_of(model: keras.Model, loss: Any) -> Callable[[Any, Any, Any, Any], Any]:
    """(x, y, sample_weight, outputs) -> loss: the one given to `open`, else the one the model was compiled with."""
    if loss is not None:
        function = keras.losses.get(loss)
        return lambda x, y, weight, outputs: keras.ops.mean(function(y, outputs))
    if not getattr(model, "compiled", False):
        raise DataError("gradients need a loss: compile the model, or pass loss= to secateur.open")
    return lambda x, y, weight, outputs: model.compute_loss(x, y, outputs, weight, training=False)


def gradients(model: keras.Model, variables: Mapping[str, Any], batch: Any, loss: Any = None) -> dict[str, np.ndarray]:
    """dL/dw of one batch for every variable that the loss depends on, in inference mode, as numpy.

    Raises DataError: no loss, no labels, a loss that is not one finite number.
    """
    value_of = loss_of(model, loss)
    x, y, weight = unpack(batch)
    if y is None:
        raise DataError("gradients need labels: pass batches as (x, y)")
    x, y, weight = tree.map_structure(lambda a: None if a is None else keras.ops.convert_to_tensor(a), (x, y, weight))

    def forward() -> Any:
        value = value_of(x, y, weight, model(x, training=False))
        if len(value.shape):
            raise DataError(f"the loss has shape {tuple(value.shape)}; it must be one number, the mean over the batch")
        return value

    value, found = (_by_tensorflow if keras.backend.backend() == "tensorflow" else _by_torch)(variables, forward)
    if not np.isfinite(value):
        raise DataError(f"the loss is {value} on this data; look for NaN or huge weights, or wrong labels")
    return found


def _by_tensorflow(variables: Mapping[str, Any], forward: Callable[[], Any]) -> tuple[float, dict[str, np.ndarray]]:
    import tensorflow as tf

    names = list(variables)
    tensors = [variables[name].value for name in names]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        loss = forward()
    found = tape.gradient(loss, tensors)
    pairs = zip(names, found, strict=True)
    return float(loss), {name: tf.convert_to_tensor(g).numpy() for name, g in pairs if g is not None}


def _by_torch(variables: Mapping[str, Any], forward: Callable[[], Any]) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    names = list(variables)
    tensors = [variables[name].value for name in names]
    before = [t.requires_grad for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(True)
        with torch.enable_grad():
            loss = forward()
        found = torch.autograd.grad(loss, tensors, allow_unused=True)
    finally:
        for t, flag in zip(tensors, before, strict=True):
            t.requires_grad_(flag)
    pairs = zip(names, found, strict=True)
    return float(loss.detach()), {name: g.detach().cpu().numpy() for name, g in pairs if g is not None}
