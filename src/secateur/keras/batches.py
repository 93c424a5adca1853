"""Batches of Keras: `(x, y)`, `(x, y, sample_weight)` or `x` alone, where x may be a dict or a list."""

from typing import Any

import keras
import numpy as np
from keras import tree

from secateur.agreement import leaves
from secateur.errors import DataError


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, labels and sample weights, None where there are none."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    return x, y, weight


def run(model: keras.Model, x: Any) -> Any:
    """Outputs in inference mode."""
    try:
        return model(tree.map_structure(keras.ops.convert_to_tensor, x), training=False)
    except (ValueError, TypeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if any(word in str(error) for word in ("incompatible with the layer", "Missing data for input", "expects")):
            raise DataError(f"the batch does not fit the model: {lines[0].rstrip('.')}") from error
        raise


def floats(outputs: Any) -> list[np.ndarray]:
    """The floating outputs as numpy."""
    return [a for a in flat(outputs) if np.issubdtype(a.dtype, np.floating)]


def flat(outputs: Any) -> list[np.ndarray]:
    """All outputs as numpy, in the order of Keras, which is that of the programs it writes."""
    return [np.asarray(keras.ops.convert_to_numpy(x)) for x in tree.flatten(outputs)]


def named_arrays(outputs: Any) -> dict[str, np.ndarray]:
    """All outputs as numpy, by name, as `secateur.agreement.leaves` names them; a single one is `output`.

    A rebuilt model gives a single output as such, also where the first gave a list of one.
    """
    named = dict(leaves(outputs, to_array=_array))
    return {"output": next(iter(named.values()))} if len(named) == 1 else named


def _array(value: Any) -> np.ndarray | None:
    """A tensor as numpy, None for what is no tensor."""
    return np.asarray(keras.ops.convert_to_numpy(value)) if keras.ops.is_tensor(value) else None
