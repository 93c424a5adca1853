"""hold: zeros that stay zero in `fit`, through a constraint on each weight that every Keras optimizer applies after its
step. Weight decay and momentum cannot revive a weight, and its moving average (`use_ema`) is cleared with it.

A constraint sits on the variable, not in the layer's config: a saved model carries the zeros and nothing else.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np


class Keep:
    """A constraint: zero where the mask is False. before: the constraint that the weight had, which runs first."""

    def __init__(self, mask: np.ndarray, before: Any, model: keras.Model) -> None:
        self.mask = keras.Variable(mask.astype("float32"), trainable=False, name="mask")
        self.before = before
        self._model = weakref.ref(model)

    def __call__(self, weight: Any) -> Any:
        """The weight with its zeros; called by the optimizer with the variable."""
        self._clear_average(weight)
        value = weight if self.before is None else self.before(weight)
        value = keras.ops.convert_to_tensor(value)
        return keras.ops.where(self.mask.value > 0, value, keras.ops.zeros_like(value))

    def _clear_average(self, weight: Any) -> None:
        model = self._model()
        optimizer = getattr(model, "optimizer", None)
        averages = getattr(optimizer, "_model_variables_moving_average", None)
        if optimizer is None or not averages or not isinstance(weight, keras.Variable):
            return
        average = averages[optimizer._get_variable_index(weight)]
        average.assign(average.value * keras.ops.cast(self.mask.value, average.dtype))


def hold(model: keras.Model, variables: Mapping[str, Any], masks: Mapping[str, np.ndarray]) -> None:
    """Zero and constrain the weights that have a mask, and update the masks of those that are held already.

    variables, masks: by name; a mask is a bool array of the weight's shape, True where a value is kept.
    """
    is_new = False
    for name, mask in masks.items():
        variable = variables[name]
        if isinstance(variable.constraint, Keep):
            variable.constraint.mask.assign(mask.astype("float32"))
        else:
            variable.constraint = Keep(mask, variable.constraint, model)
            is_new = True
        clear(variable, mask)
    if is_new:
        retrace(model)


def clear(variable: Any, mask: np.ndarray) -> None:
    """Write zeros where the mask is False."""
    variable.assign(np.where(mask, keras.ops.convert_to_numpy(variable), np.zeros((), "float32")))


def release(model: keras.Model, variables: Mapping[str, Any]) -> None:
    """Take away the constraints of `hold`; zeros stay as they are until the next step."""
    constrained = [v for v in variables.values() if isinstance(v.constraint, Keep)]
    for variable in constrained:
        variable.constraint = variable.constraint.before
    if constrained:
        retrace(model)


def held_masks(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The masks of weights that are held, by name."""
    return {
        name: keras.ops.convert_to_numpy(v.constraint.mask) > 0
        for name, v in variables.items()
        if isinstance(v.constraint, Keep)
    }


def retrace(model: keras.Model) -> None:
    """Make the compiled training step anew, because it does not know new constraints."""
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)
