"""Watches layers while a model runs: the inputs of linear weights, and attention scores. For the time of a context a
method of a layer is replaced by one that looks at its arguments first.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from secateur.errors import ModelError
from secateur.keras.rules import letters


class Tokens:
    """Which positions of a batch are real: the Keras masks that layers have read, by shape (batch, positions)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], np.ndarray] = {}

    def clear(self, mask: Any = None) -> None:
        """Begin a new batch, with its mask where the user has a function for it."""
        self._seen = {}
        if mask is not None:
            real = keras.ops.convert_to_numpy(mask).astype(bool)
            self._seen[real.shape] = real

    def note(self, tensor: Any) -> None:
        """Remember the mask that a tensor carries."""
        mask = getattr(tensor, "_keras_mask", None)
        if mask is not None and len(mask.shape) == 2:
            real = keras.ops.convert_to_numpy(mask).astype(bool)
            self._seen.setdefault(real.shape, real)

    def of(self, tensor: Any) -> np.ndarray | None:
        """The mask of a tensor (batch, positions, ...): its own, else the last noted for that many positions."""
        mask = getattr(tensor, "_keras_mask", None)
        if mask is not None and len(mask.shape) == 2:
            return keras.ops.convert_to_numpy(mask).astype(bool)
        return self._seen.get(tuple(tensor.shape[:2])) if len(tensor.shape) > 2 else None


@contextlib.contextmanager
def replaced(layer: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Temporarily replace `layer.name` by `make(layer.name)`."""
    setattr(layer, name, make(getattr(layer, name)))
    try:
        yield
    finally:
        delattr(layer, name)


def rows(layer: Any, x: Any, mask: np.ndarray | None) -> np.ndarray | None:
    """The inputs of a Dense or EinsumDense as (tokens, inputs), float32, without padding; None for an EinsumDense that
    has one matrix for each unit of a dimension, because each matrix reads other inputs.
    """
    array = keras.ops.convert_to_numpy(x).astype(np.float32)
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, weight, output = letters(layer, array.ndim)
        if set(weight) & set(inputs) & set(output):
            return None
        contracted = [inputs.index(letter) for letter in weight if letter in inputs and letter not in output]
        array = np.moveaxis(array, contracted, range(-len(contracted), 0))
        array = array.reshape(*array.shape[: array.ndim - len(contracted)], -1)
    if mask is not None and array.ndim > 2 and mask.shape == array.shape[:2]:
        return array[mask].reshape(-1, array.shape[-1])
    return array.reshape(-1, array.shape[-1])


def noting(tokens: Tokens) -> Callable[[Any], Any]:
    """For any layer: note the masks of the tensors that it reads."""

    def make(call: Any) -> Any:
        def look(*args: Any, **kwargs: Any) -> Any:
            for x in args:
                if hasattr(x, "shape"):
                    tokens.note(x)
            return call(*args, **kwargs)

        return look

    return make


def reading(layer: Any, tokens: Tokens, use: Callable[[np.ndarray], None]) -> Callable[[Any], Any]:
    """For a linear layer: pass its input rows to `use` before it runs."""

    def make(call: Any) -> Any:
        def look(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            read = rows(layer, inputs, tokens.of(inputs))
            if read is not None:
                use(read)
            return call(inputs, *args, **kwargs)

        return look

    return make


Scores = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], None]
"""(softmax weights (batch, heads, queries, keys), values (batch, heads, keys, v), real queries) -> None."""


def attending(layer: Any, path: str, tokens: Tokens, use: Scores) -> Callable[[Any], Any]:
    """For an attention layer: compute its softmax weights, check that they explain its output, pass them to `use`."""
    scale = getattr(layer, "_inverse_sqrt_key_dim", None) or layer._inverse_sqrt_head_dim

    def make(compute: Any) -> Any:
        def look(
            query: Any, key: Any, value: Any, attention_mask: Any = None, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            result = compute(query, key, value, attention_mask, *args, **kwargs)
            if len(query.shape) != 4:
                raise ModelError(f"{path} attends over more than one dimension; use magnitude, gradient or taylor")
            q, k, v = (np.moveaxis(keras.ops.convert_to_numpy(x), 2, 1).astype(np.float32) for x in (query, key, value))
            logits = q @ np.swapaxes(k, -1, -2) * scale
            allowed = np.ones(logits.shape, dtype=bool)
            if attention_mask is not None:
                mask = keras.ops.convert_to_numpy(attention_mask).astype(bool)
                allowed &= mask if mask.ndim == 4 else mask[:, None]
            if kwargs.get("use_causal_mask"):
                allowed &= np.tri(*logits.shape[-2:]) > 0
            weights = masked_softmax(logits, allowed)
            _explain(path, weights, v, keras.ops.convert_to_numpy(result[0]), allowed)
            use(weights, v, tokens.of(query))
            return result

        return look

    return make


def masked_softmax(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Softmax over the last dimension where allowed; a query that may look nowhere gets zeros."""
    shifted = np.where(allowed, logits, -np.inf)
    top = shifted.max(-1, keepdims=True)
    powers = np.exp(shifted - np.where(np.isfinite(top), top, 0.0))
    total = powers.sum(-1, keepdims=True)
    return np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)


def _explain(path: str, weights: np.ndarray, v: np.ndarray, output: np.ndarray, allowed: np.ndarray) -> None:
    got = np.moveaxis(output, 2, 1)
    if not np.isfinite(got).all() or not np.isfinite(weights).all():
        raise ModelError(f"the attention in {path} gives NaN or infinity; look for NaN or huge values in the weights")
    seen = allowed.any(-1, keepdims=True)
    worst = float(np.abs(np.where(seen, weights @ v - got, 0.0)).max())
    if worst > 1e-3 * max(1.0, float(np.abs(got).max())):
        raise ModelError(
            f"the attention in {path} is not softmax(QK)V alone, so its heads cannot be scored by it; use magnitude, "
            "gradient, taylor, fisher or activation"
        )
