"""Gradients of the loss with respect to weights, on the TensorFlow and the torch backend."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import tree

from secateur.errors import DataError
from secateur.keras.batches import unpack

Loss = Callable[[Any, Any], Any]
"""`loss(y, outputs)`: one value for each example or position, or a scalar, their mean over the batch."""


class _OfValues(keras.losses.Loss):
    """Losses that are computed already, weighted, masked and averaged as Keras does it."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


def loss_of(model: keras.Model, loss: Any) -> Callable[[Any, Any, Any, Any], Any]:
    """(x, y, sample_weight, outputs) -> loss: `loss` itself, or that with which the model was compiled."""
    if loss is not None:
        function = keras.losses.get(loss)
        if isinstance(function, keras.losses.Loss):
            return lambda x, y, weight, outputs: keras.ops.mean(function(y, outputs, weight))
        return lambda x, y, weight, outputs: _averaged(function(y, outputs), weight, mask_of(outputs))
    if not getattr(model, "compiled", False):
        raise DataError("gradients need a loss: compile the model, or pass loss= to secateur.open")
    return lambda x, y, weight, outputs: model.compute_loss(x, y, outputs, weight, training=False)


def _averaged(values: Any, weight: Any, mask: Any) -> Any:
    if not len(values.shape):
        if weight is not None:
            raise DataError(
                "the loss gives one number for a batch, which sample weights cannot reach; return one value for each "
                "example, or leave the weights out"
            )
        return values
    if mask is not None and len(values.shape) >= len(mask.shape):
        values._keras_mask = mask
    return _OfValues()(values, values, weight)


def mask_of(outputs: Any) -> Any:
    """The Keras mask of the first output, or None."""
    return getattr(tree.flatten(outputs)[0], "_keras_mask", None)


def items_of(loss: Any, outputs: Any, weight: Any) -> tuple[float, bool]:
    """How many items the loss of a batch runs over, and whether it is their mean (else their sum).

    Keras takes the mean over all dimensions of an output but the last: examples, or positions that are not masked. Only
    the reduction "mean_with_sample_weight" divides by the sum of the sample weights instead.
    """
    reduction = getattr(loss, "reduction", None)
    first, mask = tree.flatten(outputs)[0], mask_of(outputs)
    shape = tuple(first.shape[:-1]) if len(first.shape) > 1 else tuple(first.shape)
    count = np.ones(shape) if mask is None else keras.ops.convert_to_numpy(mask).astype(np.float64)
    if weight is not None and reduction == "mean_with_sample_weight":
        weights = keras.ops.convert_to_numpy(tree.flatten(weight)[0])
        count = count * weights.reshape(*weights.shape[: count.ndim], *[1] * (count.ndim - weights.ndim))
    return float(count.sum()), reduction != "sum"


class BatchGradients(NamedTuple):
    """Gradients of one batch.

    values: by name of the variable.
    items, mean: what `items_of` returns.
    """

    values: dict[str, np.ndarray]
    items: float
    mean: bool


def gradients(model: keras.Model, variables: Mapping[str, Any], batch: Any, loss: Any = None) -> BatchGradients:
    """dL/dw of one batch for every variable that the loss depends on, in inference mode, as numpy.

    Raises DataError: no loss, no labels, a loss that is not one finite number.
    """
    value_of = loss_of(model, loss)
    x, y, weight = unpack(batch)
    if y is None:
        raise DataError("gradients need labels: pass batches as (x, y)")
    x, y, weight = tree.map_structure(lambda a: None if a is None else keras.ops.convert_to_tensor(a), (x, y, weight))

    items: list[tuple[float, bool]] = []

    def forward() -> Any:
        outputs = model(x, training=False)
        value = value_of(x, y, weight, outputs)
        items.append(items_of(loss if loss is not None else getattr(model, "loss", None), outputs, weight))
        if len(value.shape):
            raise DataError(f"the loss has shape {tuple(value.shape)}; it must be one number, the mean over the batch")
        return value

    value, by_name = (_by_tensorflow if keras.backend.backend() == "tensorflow" else _by_torch)(variables, forward)
    if not np.isfinite(value):
        raise DataError(f"the loss is {value} on this data; look for NaN or huge weights, or wrong labels")
    return BatchGradients(by_name, *items[0])


def _by_tensorflow(variables: Mapping[str, Any], forward: Callable[[], Any]) -> tuple[float, dict[str, np.ndarray]]:
    import tensorflow as tf

    names = list(variables)
    tensors = [variables[name].value for name in names]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        loss = forward()
    pairs = zip(names, tape.gradient(loss, tensors), strict=True)
    return float(loss), {name: tf.convert_to_tensor(g).numpy() for name, g in pairs if g is not None}


def _by_torch(variables: Mapping[str, Any], forward: Callable[[], Any]) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    names = list(variables)
    tensors = [variables[name].value for name in names]
    before = [t.requires_grad for t in tensors]
    try:
        for t in tensors:
            t.requires_grad = True
        with torch.enable_grad():
            loss = forward()
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    finally:
        for t, flag in zip(tensors, before, strict=True):
            t.requires_grad = flag
    pairs = zip(names, grads, strict=True)
    return float(loss.detach()), {name: g.detach().cpu().numpy() for name, g in pairs if g is not None}
