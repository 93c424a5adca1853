"""Save a pruned PyTorch model as a folder that `from_pretrained` (or `load`) opens, and open it.

A model whose sizes the numbers of a configuration describe becomes a stock checkpoint, which opens without secateur.
All other models get a manifest.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import ModelError, SecateurError, shown
from secateur.files import new_folder, write_json
from secateur.plan import Plan
from secateur.schemas import reading
from secateur.schemas.manifest import PlainManifest
from secateur.schemas.model_folder import REMEDY, read_config, read_index
from secateur.torch.base import manifest, remote_code
from secateur.torch.base.expected_errors import EXPECTED
from secateur.torch.base.manifest import Changes, changes_of, remember
from secateur.torch.data.text_rows import has_tokenizer
from secateur.torch.files import stock_config, zero_packing
from secateur.torch.files.companions import carry
from secateur.torch.files.completeness import check_config, check_counts, check_flag, from_pretrained, without_bars
from secateur.torch.files.describe import describe
from secateur.torch.files.hashes import check_hashes, write_hashes
from secateur.torch.files.safetensors_header import INDEX, WEIGHTS, Entry, read_entries
from secateur.torch.files.saved_config import TOKENS, config_of, write_config
from secateur.torch.shrink.resize import check_unquantized
from secateur.torch.shrink.size_attributes import is_size
from secateur.torch.shrink.vocabulary import has_fewer_tokens, save_tokenizer

MANIFEST = "secateur.json"
FORMAT = 1
PICKLED = (
    "{source} holds pickled weights ({file}), which can run code when opened; convert them to safetensors where you "
    "trust them, for example with save_pretrained"
)


@dataclass(frozen=True)
class Saved:
    """What `save` wrote.

    folder: the folder.
    stock: whether the folder opens without secateur.
    packed: whether any weight is packed.
    reason: why the folder needs secateur; empty for a stock checkpoint.
    """

    folder: Path
    stock: bool
    packed: bool
    reason: str = ""


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    changes: Changes | None = None,
    plan: Plan | None = None,
    uniform: bool = False,
    tokenizer: Any = None,
    processor: Any = None,
    carried: Path | None = None,
    overwrite: bool = False,
    pack: bool | None = None,
    max_shard_size: int | str | None = None,
) -> Saved:
    """Write a model, whole or not at all.

    changes: everything that differs from the stock model; by default what the model itself remembers.
    plan: written into the folder as well.
    uniform: demand a stock checkpoint; ModelError with the reason when the sizes do not allow one.
    tokenizer, processor: anything with `save_pretrained`, written into the folder as well.
    carried: the folder that the model came from; what belongs to the model there is copied (see
        `secateur.torch.files.companions`), with the tokenizer, unless tokens were removed from it.
    pack: store weights with many zeros as bitmask and values; by default when the plan holds element masks.
    max_shard_size: as in `save_pretrained`; for Hugging Face models only.

    Raises SecateurError when the folder exists (unless `overwrite`) or cannot be written.
    """
    changes = changes_of(model) if changes is None else changes
    pack = bool(plan is not None and plan.masks) and not uniform if pack is None else pack
    if uniform and pack:
        raise ModelError("a stock checkpoint cannot hold packed weights; pass either uniform or pack")
    check_unquantized(model)
    hugging_face = hasattr(model, "save_pretrained") and _has_hugging_face_config(model)
    config, reason = config_of(model, changes) if hugging_face else (None, "plain PyTorch modules need secateur")
    if uniform and config is None:
        remedy = "" if reason == TOKENS else "prune every layer alike, or "
        raise ModelError(f"no stock checkpoint can hold this model: {reason}; {remedy}leave out uniform")
    if hugging_face:
        _check_config(model.config if config is None else config)
    if any(tensor.is_meta for tensor in manifest.named_tensors(model).values()):
        raise ModelError("the model has tensors on the meta device, which hold no numbers; load its weights first")
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        if hugging_face:
            packed = _save_hugging_face(model, temporary, changes, config, pack=pack, max_shard_size=max_shard_size)
        else:
            packed = _save_plain(model, temporary, changes, pack=pack)
        if carried is not None:
            carry(carried, temporary, with_tokenizer=not has_fewer_tokens(model))
        _save_companions(model, temporary, tokenizer, processor, plan)
        describe(model, temporary, source=carried, is_pruned=bool(changes))
        write_hashes(temporary)
    if config is not None and packed:
        reason = "the weights are packed"
    return Saved(Path(folder), stock=config is not None and not packed, packed=packed, reason=reason)


def _save_companions(model: nn.Module, folder: Path, tokenizer: Any, processor: Any, plan: Plan | None) -> None:
    """Write what goes with a model: its tokenizer, its processor and its plan, as far as there are any."""
    if tokenizer is not None and (has_fewer_tokens(model) or not has_tokenizer(folder)):
        save_tokenizer(model, tokenizer, folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if plan is not None:
        replace(plan, weights={}).save(folder)  # the model's files hold the weights


def load(folder: Path | str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Open a saved folder.

    Without `model`: a Hugging Face folder, by the class named in its config; `options` go to `from_pretrained`.
    With `model`: a fresh instance of the plain PyTorch module that was saved, which is changed and filled in place.

    Raises ModelError when the folder is no such model, is damaged, or does not fit `model`.
    """
    folder = Path(folder)
    check_folder(folder, CONFIG if model is None else MANIFEST)
    if model is not None:
        return _load_plain(folder, model)
    import transformers  # optional: plain PyTorch modules do not need it

    from secateur.torch.files import from_pretrained_hook  # imports transformers

    from_pretrained_hook.register()
    trusted = remote_code.stated(options.get("trust_remote_code"))
    names = read_config(folder / CONFIG).get("architectures")
    factory = model_class(folder / CONFIG, names[0] if names else None)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        check_claims(folder, factory, config)
        return from_pretrained(factory, folder, **{"use_safetensors": True, **options, "trust_remote_code": trusted})
    except SecateurError:
        raise
    except Exception as error:  # a damaged folder breaks transformers in many ways
        remote_code.check(folder, error)
        raise ModelError(f"{folder} cannot be loaded: {first_sentence(error)}") from error


def model_class(source: object, name: Any) -> Any:
    """The model class of transformers of that name; ModelError when there is none."""
    import transformers  # optional: plain PyTorch modules do not need it

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(f"{source} names no model class of transformers (architectures: {name!r})")
    return found


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error, in one line of at most 300 characters."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return text if len(text) < 300 else text[:297] + "..."


CONFIG = "config.json"


def check_folder(folder: Path | str, description: str = CONFIG) -> list[Path]:
    """The weight files of a model folder; ModelError with the reason when it is no model folder, or is refused.

    Refused is also a config that claims more modules or labels than the weight files can hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give one that holds {description} and {WEIGHTS}")
    if not (folder / description).is_file():
        raise ModelError(f"{folder} is no saved model: it has no {description}")
    config = read_json(folder / description) if description != CONFIG else read_config(folder / CONFIG)
    files = [folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():  # transformers, too, opens the single file where it is
        files = [folder / name for name in dict.fromkeys(read_index(folder / INDEX).values())]
    missing = next((f for f in files if not f.is_file()), None)
    if missing:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
        if pickled:
            raise ModelError(PICKLED.format(source=folder, file=pickled[0].name))
        raise ModelError(f"{folder} is no saved model: {missing.name} is missing")
    entries = _entries(files)
    if description == CONFIG:
        check_counts(folder, config, entries)
    return files


def has_schedule(folder: Path) -> bool:
    """Whether a folder remembers a schedule of tokens."""
    if not (folder / CONFIG).is_file():
        return False
    described = read_config(folder / CONFIG).get("quantization_config")
    return isinstance(described, dict) and described.get("tokens") is not None


def check_unchanged(source: Path | str) -> int:
    """Compare a saved folder with the hashes that were written with it; returns the number of files that have one.

    Raises ModelError for what is no folder, for weights and a configuration that were not there when it was saved, and
    as `check_hashes` and `check_folder` do.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ModelError(f"{source} is no folder, and only folders that secateur saved have hashes; leave out --check")
    same = check_hashes(folder)
    description = CONFIG if (folder / CONFIG).is_file() else MANIFEST
    weights = check_folder(folder, description)
    for file in (folder / description, folder / INDEX, *weights):
        if file.is_file() and file.name not in same:
            raise ModelError(f"{folder} has changed: {file.name} was not there when it was saved; {REMEDY}")
    return len(same)


def check_claims(folder: Path, factory: Any, config: Any) -> None:
    """ModelError when a config describes a larger model than the weight files hold, or files of another kind.

    The sizes of a folder with our manifest are checked while it loads, because the manifest changes them.
    """
    entries = _entries(check_folder(folder))
    manifest_here = getattr(config, "quantization_config", None)
    if manifest_here is None:
        check_flag(folder, entries, packed=False)
    if not isinstance(manifest_here, dict) or manifest_here.get("quant_method") != "secateur":
        check_config(folder, factory, config, entries)


def _entries(files: Iterable[Path]) -> dict[str, Entry]:
    return {name: entry for file in files for name, entry in read_entries(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; ModelError when it holds no object."""
    return reading.read_json(path, remedy=REMEDY, infinite=True)


# -- Hugging Face -------------------------------------------------------------------------------------------------


def _has_hugging_face_config(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "to_diff_dict")


def attach(model: nn.Module) -> None:
    """Put the changes that a model remembers, and its schedule of tokens, into its Hugging Face config, so that
    `save_pretrained` writes them.

    A model without such a config is unchanged.
    """
    if _has_hugging_face_config(model):
        from secateur.torch.files import from_pretrained_hook  # imports transformers

        from_pretrained_hook.attach(model, changes_of(model))


def _check_config(config: Any) -> None:
    """Raise ModelError for a configuration that transformers refuses to write."""
    try:
        stock_config.validate(config)
    except EXPECTED as error:
        raise ModelError(
            f"transformers refuses the {type(config).__name__} of the model ({first_sentence(error)}); set its numbers "
            "to those that the model was built from"
        ) from error


def _save_hugging_face(
    model: Any, folder: Path, changes: Changes, config: Any, *, pack: bool, max_shard_size: int | str | None
) -> bool:
    """Write weights and config, `config` where it is not None; returns whether any weight was packed."""
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with _saving_resized(model, changes), without_bars():
        model.save_pretrained(folder, save_original_format=config is not None and not pack, **options)
    packed = zero_packing.pack_folder(folder) if pack else False
    write_config(model, folder, changes, config, packed=packed)
    return packed


@contextlib.contextmanager
def _saving_resized(model: Any, changes: Changes) -> Iterator[None]:
    """A context in which tensors of another size are saved that the class computes, and so does not save, at its own:
    units have gone from sinusoidal positions.
    """
    before = getattr(model, "_keys_to_ignore_on_save", None)
    model._keys_to_ignore_on_save = {name for name in before or () if name not in changes.shapes}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before


# -- plain PyTorch modules ----------------------------------------------------------------------------------------


def _save_plain(model: nn.Module, folder: Path, changes: Changes, *, pack: bool) -> bool:
    """Write the state and the manifest of a plain PyTorch module; returns whether any weight was packed."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict(keep_vars=True).items()}
    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
    kept = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    written = zero_packing.pack_state(kept) if pack else kept
    save_file(written, folder / WEIGHTS, metadata={"format": "pt"})
    packed = written.keys() != kept.keys()
    listed = {"changes": changes.to_json(), "checksum": changes.checksum()}
    write_json(folder / MANIFEST, {"format": FORMAT, "packed": packed, "tied": tied, **listed})
    return packed


def _load_plain(folder: Path, model: nn.Module) -> nn.Module:
    data = read_json(folder / MANIFEST)
    if data.get("format") != FORMAT:
        raise ModelError(f"{folder / MANIFEST} has format {shown(data.get('format'))}; this version reads {FORMAT}")
    read = reading.check(data, PlainManifest, str(folder / MANIFEST), remedy=REMEDY)
    changes, tied = Changes.from_json(read.changes), read.tied
    check_flag(folder, read_entries(folder / WEIGHTS), packed=read.packed)
    manifest.apply(model, changes, is_size)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        state = zero_packing.unpack_state(load_file(folder / WEIGHTS), shapes)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged or cut short ({error}); save or copy it again") from None
    state.update({alias: state[name] for alias, name in tied.items() if name in state})
    _check_state(model, state, shapes)
    model.load_state_dict(state)
    manifest.take_buffers(model, changes)
    manifest.set_configs(model, changes)
    changes.check(read.checksum, folder)
    remember(model, changes)
    attach(model)
    return model


def _check_state(model: nn.Module, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(shapes.keys() ^ state.keys()):
        lacking = "the file lacks" if name in shapes else f"{type(model).__name__} lacks"
        raise ModelError(f"{lacking} {name}; give the same fresh model that was pruned and saved")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise ModelError(f"the file holds {name} as {tuple(state[name].shape)}, the model has it as {shape}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise ModelError(f"the file holds {name} as {state[name].dtype}, the model has it as {tensor.dtype}")
