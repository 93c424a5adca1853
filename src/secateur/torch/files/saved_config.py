"""The config.json of a pruned Hugging Face model: a stock one where its numbers describe the sizes, else a manifest.

Shapes are enough for both, so that a model on the meta device can get its config while others write its weights.
"""

import copy
from pathlib import Path
from typing import Any

from secateur.files import write_json
from secateur.schemas.model_folder import REMEDY
from secateur.schemas.reading import read_json
from secateur.torch.base.manifest import Changes
from secateur.torch.files import stock_config
from secateur.torch.tokens.entry import entry_of
from secateur.torch.tokens.install import tokens_of

CONFIG = "config.json"
TOKENS = "secateur has to be there when it runs, to keep to its schedule of tokens"
"""Why a model with a schedule of tokens needs secateur."""


def config_of(model: Any, changes: Changes) -> tuple[Any | None, str]:
    """The configuration of a stock checkpoint of the model, or None and the reason why there is none."""
    if tokens_of(model) is not None:
        return None, TOKENS
    if changes:
        return stock_config.find_config(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    return config, ""


def write_config(model: Any, folder: Path, changes: Changes, config: Any | None, *, packed: bool = False) -> None:
    """Write config.json: what `config_of` gave, and a manifest of the changes where that is None.

    packed: whether the weight files hold packed tensors, which a manifest has to say too.
    """
    from secateur.torch.files import from_pretrained_hook  # imports transformers

    written = copy.deepcopy(model.config if config is None else config)
    written.dtype, written.architectures = model.config.dtype, model.config.architectures
    if config is None or packed:
        listed = changes if config is None else Changes()
        written.quantization_config = from_pretrained_hook.SecateurConfig(
            listed.to_json(), packed=packed, tokens=entry_of(model)
        )
    written.save_pretrained(folder)
    if config is None or packed:
        # transformers only warns of a quantization method that it does not know, and goes on. This entry stops it with
        # an error that names secateur.
        data = read_json(folder / CONFIG, remedy=REMEDY, infinite=True)
        write_json(folder / CONFIG, {**data, "transformers_weights": from_pretrained_hook.NOTE})
