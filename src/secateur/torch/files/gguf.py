"""Model files that are no folder yet: a GGUF file dequantised into one, a hub id fetched."""

import contextlib
import copy
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError


@contextlib.contextmanager
def dequantised(file: Path, output: Path) -> Iterator[Path]:
    """The model of a GGUF file as a folder (see `convert_gguf`), which lies beside `output` while the context lasts.

    What killed processes left there is removed; a folder that is in use is locked.
    """
    parent, prefix = output.absolute().parent, f".{output.name}.gguf."
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(BlockingIOError), _locked(left):
            shutil.rmtree(left)
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with _locked(place):
        try:
            convert_gguf(file, place / "model")
            yield place / "model"
        finally:
            shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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
