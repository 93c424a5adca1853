"""The class with which transformers, and so vLLM and SGLang, can open config.json of a DeciLM folder.

DeciLM is no model of transformers: published folders bring this class as code of their own. Ours bring no code;
`register_decilm` makes the class known instead.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, LlamaConfig

MODEL_TYPE = "nemotron-nas"


class DeciLMConfig(LlamaConfig):
    """Llama's config with `block_configs`, whose entries are read as attributes: `block.attention.no_op`."""

    model_type = MODEL_TYPE

    def __init__(self, block_configs: Sequence[Any] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [named(block) for block in block_configs]
        self.rope_theta = self.rope_parameters["rope_theta"]  # transformers has it in there alone; SGLang asks for it

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the blocks as in the file."""
        return {**super().to_dict(), "block_configs": [plain(block) for block in self.block_configs]}


def named(value: Any) -> Any:
    """Dictionaries as objects with attributes."""
    return SimpleNamespace(**{k: named(v) for k, v in value.items()}) if isinstance(value, dict) else value


def plain(value: Any) -> Any:
    """Objects with attributes as dictionaries."""
    return {k: plain(v) for k, v in vars(value).items()} if isinstance(value, SimpleNamespace) else value


def register_decilm() -> None:
    """Make `AutoConfig` of this process open DeciLM folders."""
    AutoConfig.register(MODEL_TYPE, DeciLMConfig, exist_ok=True)
