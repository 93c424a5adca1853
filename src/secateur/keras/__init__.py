"""The Keras 3 host: the same axes, criteria, plans and guarantees for models trained with `model.fit`.

    model = secateur.keras.prune(model, threshold=0.1)    # zeros that stay zero in compile and fit
    model.fit(..., callbacks=[secateur.keras.GradualPruning(schedule=...)])

`secateur.open(model)` gives the whole tool. Runs on the TensorFlow and the torch backend of Keras.
"""

import importlib.util

from secateur.errors import ModelError

if importlib.util.find_spec("keras") is None:
    raise ModelError("keras is not installed; `pip install 'secateur[keras]'` (or 'secateur[tensorflow]')")

from secateur.keras.callback import GradualPruning
from secateur.keras.easy import prune, release
from secateur.keras.export import export
from secateur.keras.files import load
from secateur.keras.host import KerasHost

__all__ = ["GradualPruning", "KerasHost", "export", "load", "prune", "release"]
