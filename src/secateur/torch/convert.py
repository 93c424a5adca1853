"""Model files that are no folder yet: a GGUF file dequantised into one, a hub id fetched."""

import copy
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantised to float32, as a folder; read whole by transformers.

    Raises ModelError where transformers cannot read it.
    """
    import transformers

    if not file.is_file():
        raise ModelError(f"{file} does not exist; pass a model folder, a hub id or a .gguf file")
    name: Any = file.name
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=name)
    except Exception as error:  # an unknown architecture or a damaged file shows in many ways
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"transformers cannot read {file}: {text}") from None
    config = copy.deepcopy(read.config)
    vars(config).pop("quantization_config", None)
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="1GB")
    tokenizer.save_pretrained(folder)


def fetch(name: str) -> Path:
    """The folder of a hub id in the local cache, fetched where it is absent; ModelError when it cannot be had."""
    from huggingface_hub import snapshot_download

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name} does not exist; pass a model folder or a hub id such as org/name")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise ModelError(
            f"{name} is no folder, and could not be fetched from the hub ({str(error).splitlines()[0][:150]})"
        ) from None
