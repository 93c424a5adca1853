"""Files that belong to a model beside its weights and its config; they follow it to the folder that it is saved to.

These are the tokenizer and the processor, and of a sentence-transformers folder all that is not weights or config of
the transformer. They are copied as they are, so that whoever opens the new folder does the same to texts.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

from secateur.card.write import NAME as CARD
from secateur.schemas.sentence_folder import read_modules
from secateur.torch.data.text_rows import VOCABULARIES, has_tokenizer, load_tokenizer
from secateur.torch.shrink.vocabulary import has_fewer_tokens

TOKENIZERS = (*VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "normalizer.json")
PROCESSORS = (*TOKENIZERS, "chat_template.*", "*preprocessor_config.json", "processor_config.json")
"""Files of tokenizers, image processors and feature extractors, as `save_pretrained` names them."""
CONFIG = "config.json"
NOT_CARRIED = (
    *(CONFIG, "generation_config.json", "*.index.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.pkl", "*.pickle", "*.npz", "*.tflite", "*.keras"),
    *("plan.json", "secateur.json", "kept_tokens.json", "runtime.json", "artefact.json", "secateur-*.json", CARD),
)
"""Weights and config of a model, and what describes it and how it was pruned: the model that is saved has its own."""


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


def folder_of(source: str) -> Path | None:
    """The folder that a model was loaded from: the folder itself, or that of a hub id in the cache; None without one.

    source: a folder, a hub id, or a hub id with its revision (`org/name@revision`).

    Of a hub id, companions that the cache lacks are fetched, as `from_pretrained` fetched the model; a warning says
    when that fails.
    """
    if not source or Path(source).is_dir():
        return Path(source) if source else None
    from huggingface_hub import snapshot_download, try_to_load_from_cache  # optional: installed with transformers

    name, _, revision = source.partition("@")
    try:
        known = try_to_load_from_cache(name, CONFIG, revision=revision or None)
    except ValueError:  # of a name that is no hub id
        return None
    if not isinstance(known, str):
        return None
    folder = Path(known).parent
    try:
        snapshot_download(name, revision=folder.name, allow_patterns=[*PROCESSORS, CARD, "*.json", "*.txt", "*_*/*"])
    except OSError as error:  # of the hub and the network; offline it is content with the cache
        what = " ".join(str(error).split())[:200]
        warnings.warn(f"files beside the weights of {name} are taken from the cache alone: {what}", stacklevel=3)
    return folder


def companions_from(model: Any, source: str | None) -> dict[str, Any]:
    """Arguments of `saving.save` that take along what lies beside a model.

    source: the folder or hub id that it was opened from, see `folder_of`. None for a module: what belongs to it is not
        known then, and a warning says so where it once came from a folder with a tokenizer.
    """
    name = str(getattr(model, "name_or_path", "") or "") if source is None else source
    if source is None and not (Path(name).is_dir() and has_tokenizer(name)):
        return {}
    folder = None if source is None else folder_of(source)
    if folder is None:
        warnings.warn(f"no tokenizer of {name} is saved with this model; pass tokenizer= or processor=", stacklevel=3)
        return {}
    tokenizer = load_tokenizer(folder) if has_fewer_tokens(model) and has_tokenizer(folder) else None
    return {"carried": folder, "tokenizer": tokenizer}
