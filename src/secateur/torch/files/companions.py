"""Files that belong to a model beside its weights and its config; they follow it to the folder that it is saved to.

These are the tokenizer and the processor, and of a sentence-transformers folder all that is not weights or config of
the transformer. They are copied as they are, so that whoever opens the new folder does the same to texts.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

from secateur.errors import ModelError
from secateur.schemas.sentence_folder import read_modules
from secateur.torch.data.text_rows import VOCABULARIES, has_tokenizer, load_tokenizer
from secateur.torch.shrink.vocabulary import has_fewer_tokens

TOKENIZERS = (*VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "normalizer.json")
PROCESSORS = (*TOKENIZERS, "chat_template.*", "*preprocessor_config.json", "processor_config.json")
"""Files of tokenizers, image processors and feature extractors, as `save_pretrained` names them."""
NOT_CARRIED = (
    *("config.json", "generation_config.json", "*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.pkl", "*.pickle", "*.npz", "*.tflite", "*.keras"),
    *("plan.json", "secateur.json", "kept_tokens.json", "runtime.json", "artefact.json"),
)
"""Weights and config of a model, and what describes how it was pruned: the model that is saved has its own."""


def companions_of(source: Path, *, with_tokenizer: bool = True) -> list[Path]:
    """The companions of the model in a folder, as paths in it.

    with_tokenizer: whether files of tokenizers count.

    Raises ModelError when the `modules.json` of the folder is damaged, or names a folder outside its own.
    """
    modules = read_modules(source)
    files = [file for file in sorted(source.iterdir()) if file.is_file()]
    if modules:
        found = [file for file in files if not any(map(file.match, NOT_CARRIED))]
    else:
        found = [file for file in files if any(map(file.match, PROCESSORS)) and file.name != "kept_tokens.json"]
    if not with_tokenizer:
        found = [file for file in found if not any(map(file.match, TOKENIZERS))]
    for module in modules:
        if module.path:
            found += [file for file in sorted((source / module.path).rglob("*")) if file.is_file()]
    return [file.relative_to(source) for file in found]


def carry(source: Path, folder: Path, *, with_tokenizer: bool = True) -> None:
    """Copy the companions of the model in `source` into `folder`; files that are there already stay."""
    for name in companions_of(source, with_tokenizer=with_tokenizer):
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)


def folder_of(model: Any, source: str | None = None) -> Path | None:
    """The folder that a Hugging Face model was loaded from, for a hub id that in the cache; None where there is none.

    source: folder or hub id; default: what the model itself remembers.

    Of a hub id, companions that the cache lacks are fetched, as `from_pretrained` fetched the model.
    """
    source = str(getattr(model, "name_or_path", "") or "") if source is None else source
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    if source and Path(source).is_dir():
        return Path(source)
    if not source or commit is None:
        return None
    from huggingface_hub import snapshot_download  # optional: installed with transformers

    try:
        return Path(
            snapshot_download(source, revision=commit, allow_patterns=[*PROCESSORS, "*.json", "*.txt", "*_*/*"])
        )
    except Exception as error:  # the hub, the network and its cache fail in many ways
        raise ModelError(
            f"the tokenizer and the other files beside the weights of {source} cannot be fetched "
            f"({' '.join(str(error).split())[:200]}); pass a folder that holds them"
        ) from None


def companions_from(model: Any, source: str | None) -> dict[str, Any]:
    """Arguments of `saving.save` that take along what lies beside a model.

    source: the folder or hub id that it was opened from. None for a module: what belongs to it is not known then, and a
    warning says so where it once came from a folder with a tokenizer.
    """
    if source is None:
        name = str(getattr(model, "name_or_path", "") or "")
        if name and Path(name).is_dir() and has_tokenizer(name):
            warnings.warn(
                f"no tokenizer is saved with this model; pass tokenizer=, or carried=Path({name!r})",
                stacklevel=3,
            )
        return {}
    folder = folder_of(model, source)
    if folder is None:
        return {}
    tokenizer = load_tokenizer(folder) if has_fewer_tokens(model) and has_tokenizer(folder) else None
    return {"carried": folder, "tokenizer": tokenizer}
