"""The files of a hub id in the cache, so that its config is held against its weights before a model is built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.schemas.model_folder import read_index
from secateur.torch.files.safetensors_header import INDEX, WEIGHTS
from secateur.torch.files.saving import CONFIG


def cached_folder(source: str, options: Mapping[str, Any]) -> Path | None:
    """The folder of the cache with the config and the safetensors files of a hub id, downloaded where absent.

    options: `revision`, `token`, `cache_dir` and others of `from_pretrained` that say where files come from.

    None when it has no such files or they are out of reach, which loading says in its own words.
    """
    if _cached(source, CONFIG, options) is None:
        return None
    weights = _cached(source, WEIGHTS, options)
    if weights is None and (index := _cached(source, INDEX, options)) is not None:
        shards = [_cached(source, name, options) for name in dict.fromkeys(read_index(index).values())]
        weights = None if None in shards else index
    return None if weights is None else weights.parent


def _cached(source: str, name: str, options: Mapping[str, Any]) -> Path | None:
    from transformers.utils import cached_file  # optional: plain PyTorch modules do not need it

    try:
        found = cached_file(source, name, **options)
    except OSError:  # whatever the reason, transformers meets it again when it loads
        return None
    return None if found is None else Path(found)
