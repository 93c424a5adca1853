"""Make a model folder of a GGUF file, dequantised, or of a hub id, downloaded."""

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
    """The model of a GGUF file as a folder (see `convert_gguf`) beside `output`, which exists while the context lasts.

    Folders that killed processes left there are removed; a folder in use is locked, and so is not removed.
    """
    parent, prefix = output.absolute().parent, f".{output.name}.gguf."
    parent.mkdir(parents=True, exist_ok=True)
    for abandoned in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(BlockingIOError), _locked(abandoned):
            shutil.rmtree(abandoned)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with _locked(temporary):
        try:
            convert_gguf(file, temporary / "model")
            yield temporary / "model"
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file, dequantised to float32, as a folder; transformers reads the file as a whole.

    Raises:
        ModelError: when transformers cannot read the file.
    """
    import transformers  # optional: plain PyTorch modules do not need it

    if not file.is_file():
        raise ModelError(f"{file} does not exist; pass a model folder, a hub id or a .gguf file")
    name: Any = file.name
    try:
        options: dict[str, Any] = {"gguf_file": name, "trust_remote_code": False}
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:  # transformers raises many errors for unknown architectures and damaged files
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
    """The folder of a hub id in the local cache, downloaded if absent; ModelError when the download fails."""
    from huggingface_hub import snapshot_download  # optional: installed with transformers

    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{name} does not exist; pass a model folder or a hub id such as org/name")
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["README.md", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:  # the network, the hub and the cache fail in many ways
        raise ModelError(
            f"{name} is no folder, and could not be fetched from the hub ({str(error).splitlines()[0][:150]})"
        ) from None
