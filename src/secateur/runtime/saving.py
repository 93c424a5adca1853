"""Saves a compiled model with its packed weights and maps it back into memory; no dense copy is made at load.

A folder holds `runtime.safetensors` (every tensor; packed weights as they lie in memory), `runtime.json` (the manifest:
which modules are packed, and which were removed from the stock model) and, for Hugging Face models, their
`config.json`, from which the skeleton is built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from secateur.errors import ModelError
from secateur.files import new_folder, write_json
from secateur.kernels.native import load_native
from secateur.kernels.packing import unpack
from secateur.runtime.compile_model import put_module, share_copy
from secateur.runtime.layers.attention import use_attention
from secateur.runtime.layers.fused import check_fused, from_json, fused_modules, to_json, use_fused
from secateur.runtime.layers.linear import ByTokens, SparseLinear, layer_shape
from secateur.runtime.run.chain import ChainProgram, chains_of, use_chains
from secateur.runtime.run.decoder_step import DecoderProgram, decoders_of, use_decoders
from secateur.schemas import compiled as schemas
from secateur.schemas.reading import Schema, check, read_json
from secateur.torch.base import manifest as C
from secateur.torch.base.expected_errors import EXPECTED, in_a_line
from secateur.torch.base.manifest import changes_of, remember
from secateur.torch.files.saving import attach
from secateur.torch.shrink.size_attributes import is_size
from secateur.torch.stream.lazy_model import parameters_on_meta
from secateur.torch.tokens.entry import entry_of, install_entry

WEIGHTS, MANIFEST = "runtime.safetensors", "runtime.json"
FORMAT_VERSION = 2
AGAIN = "save or copy it again"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PARTS = {"class": str, "packed": dict, "identities": list, "aliases": dict}
"""The keys that every manifest has, and the types of their values."""


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a compiled model to `folder`, whole or not at all.

    Raises:
        SecateurError: when the model has no packed layer, so that there is nothing this format would help; when the
            folder exists (unless `overwrite`) or cannot be written.
    """
    packed = {name: module.activation for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not packed:
        raise ModelError("the model has no packed layer: compile it with secateur.runtime.compile first")
    tensors, aliases = _distinct_tensors(model)
    manifest = {
        "version": FORMAT_VERSION,
        "class": type(model).__name__,
        "packed": packed,
        "by_tokens": {name: m.tokens for name, m in model.named_modules() if isinstance(m, ByTokens)},
        "one_calls": {name: to_json(fusion) for name, fusion in fused_modules(model).items()},
        "chains": {name: [asdict(program) for program in programs] for name, programs in chains_of(model).items()},
        "decoders": {name: asdict(program) for name, program in decoders_of(model).items()},
        # Activations that were fused into a packed layer: the skeleton still has their modules.
        "identities": [name for name, module in model.named_modules() if type(module) is nn.Identity],
        "aliases": aliases,
        "changes": changes_of(model).to_json(),
    }
    schedule = entry_of(model)
    if schedule is not None:  # older versions know no such entry
        manifest["tokens"] = schedule
    config = getattr(model, "config", None)
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(temporary)
        save_file(tensors, temporary / WEIGHTS)
        write_json(temporary / MANIFEST, manifest)


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a model, each once, and the other names of tensors that have several."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, aliases


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model that `save` wrote, in eval mode; its tensors are views of the mapped file.

    Without compiled kernels packed layers become dense.

    Args:
        folder: the folder that `save` wrote.
        model: a skeleton of the same architecture and sizes (weights are ignored; it may be on the meta device).
            Not needed for Hugging Face models, those with removed units included.

    Raises:
        ModelError: when the folder holds no saved runtime model, is damaged, or does not fit the skeleton.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() or not (folder / WEIGHTS).exists():
        raise ModelError(f"{folder} holds no {MANIFEST} and {WEIGHTS}: write them with secateur.runtime.save")
    manifest = _read_manifest(folder / MANIFEST)
    model = _skeleton(folder, manifest) if model is None else share_copy(model)
    tensors = _read_tensors(folder / WEIGHTS, manifest["aliases"])
    model = _put_layers(folder / MANIFEST, manifest, model, tensors)
    _check_types(folder, model, tensors)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{folder} does not fit the model: {in_a_line(error)}") from error
    if missing or unexpected:
        raise ModelError(
            f"{folder} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}; pass the skeleton "
            "that was saved"
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name, fusion in fused_modules(model).items():
        with _damaged(folder / MANIFEST, f"{name!r} does not fit", ValueError, AttributeError):
            check_fused(_layer(model, name), fusion)
    install_entry(model, manifest.get("tokens"))
    attach(model)
    use_attention(model)
    model.eval()
    if load_native() is not None:
        _put_programs(folder / MANIFEST, manifest, model)
    return model


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest as its schema says, but for the entries of its fusions, chains and decoders."""
    manifest = read_json(path, remedy=AGAIN)
    if manifest.get("version") != FORMAT_VERSION:
        raise ModelError(f"{path} has version {manifest.get('version')}, this secateur reads {FORMAT_VERSION}")
    wrong = next((name for name, kind in PARTS.items() if not isinstance(manifest.get(name), kind)), None)
    if wrong is not None:
        raise ModelError(f"{path} is damaged: {wrong!r} is {manifest.get(wrong)!r}; {AGAIN}")
    check(manifest, schemas.Manifest, str(path), remedy=AGAIN)
    return manifest


def _read_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of the file, under all their names, at addresses that suit every type."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}); {AGAIN}") from None
    tensors = {name: tensor.clone() if tensor.data_ptr() % 8 else tensor for name, tensor in found.items()}
    for name, source in aliases.items():
        if source not in tensors:
            raise ModelError(f"{path} lacks {source}; save or copy the model again")
        if name in found:
            raise ModelError(f"{path} holds {name}, which is another name of {source}; save or copy the model again")
        tensors[name] = tensors[source]
    return tensors


def _check_types(folder: Path, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that numbers are floats where the skeleton has floats, and of the same type where it has others."""
    for name, expected in model.state_dict(keep_vars=True).items():
        dtype = expected.dtype if name not in tensors else tensors[name].dtype
        if dtype != expected.dtype and not (dtype in FLOATS and expected.dtype in FLOATS):
            raise ModelError(f"{folder} does not fit the model: {name} is {dtype}, not {expected.dtype}; {AGAIN}")


def _put_layers(
    path: Path, manifest: Mapping[str, Any], model: nn.Module, tensors: dict[str, torch.Tensor]
) -> nn.Module:
    """Replace the modules of a skeleton by those of the manifest, which `path` names in errors."""
    for name, tokens in manifest.get("by_tokens", {}).items():
        # One copy of the layer for each variant; `load` replaces them by what was saved.
        layer = _linear(model, name)
        model = put_module(model, name, ByTokens([share_copy(layer) for _ in tokens], tokens))
    for name, activation in manifest["packed"].items():
        model = _put_packed(model, name, activation, tensors)
    for name in manifest["identities"]:
        _layer(model, name)
        put_module(model, name, nn.Identity())
    for name, fusion in manifest.get("one_calls", {}).items():
        with _damaged(path, f"{name!r} is {fusion!r}", TypeError, KeyError, ValueError):
            kind = fusion.get("kind", "linear") if isinstance(fusion, dict) else "linear"
            _fits(fusion, schemas.FUSIONS[str(kind)])
            use_fused(_layer(model, name), from_json(fusion))
    return model


def _put_programs(path: Path, manifest: Mapping[str, Any], model: nn.Module) -> None:
    """Install the chains and decoder steps of a manifest, which `path` names in errors."""
    wrong = (TypeError, LookupError, AttributeError, ValueError, OverflowError, RuntimeError)
    for name, programs in manifest.get("chains", {}).items():
        with _damaged(path, f"the chains of {name!r} do not fit", *wrong):
            for program in programs:
                _fits(program, schemas.Chain)
            use_chains(_layer(model, name), [ChainProgram.from_json(program) for program in programs])
    with _damaged(path, "its decoders do not fit", *wrong):
        for data in manifest.get("decoders", {}).values():
            _fits(data, schemas.Decoder)
        decoders = {name: DecoderProgram.from_json(data) for name, data in manifest.get("decoders", {}).items()}
        use_decoders(model, decoders)


def _fits(entry: Any, schema: type[Schema]) -> None:
    check(entry, schema, "the entry", remedy=AGAIN)


@contextlib.contextmanager
def _damaged(path: Path, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors into a ModelError that says which part of a manifest is damaged."""
    try:
        yield
    except errors as error:
        raise ModelError(f"{path} is damaged: {what} ({error})") from None


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no layer {name!r}; pass the skeleton that was saved") from error


def _linear(model: nn.Module, name: str) -> nn.Module:
    """A linear layer of a model."""
    layer = _layer(model, name)
    if not all(isinstance(size, int) for size in layer_shape(layer)):
        raise ModelError(f"layer {name!r} is a {type(layer).__name__} in the model, no linear layer; {AGAIN}")
    return layer


def _put_packed(model: nn.Module, name: str, activation: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Put a packed layer into a skeleton; without kernels a dense layer, unless an activation is fused into it."""
    prefix = f"{name}." if name else ""
    if f"{prefix}packed" not in tensors:
        raise ModelError(f"the file lacks the packed weight of layer {name!r}; save the model again")
    in_model = layer_shape(_linear(model, name)) if name else None
    bias = tensors.get(f"{prefix}bias")
    try:
        sparse = SparseLinear(tensors[f"{prefix}packed"], bias, activation)
    except ValueError as error:
        raise ModelError(f"layer {name!r}: {error}") from error
    if in_model is not None and in_model != layer_shape(sparse):
        raise ModelError(f"layer {name!r} is {in_model} in the model but {layer_shape(sparse)} in the file")
    if load_native() is None and activation == "none":
        weight = torch.from_numpy(unpack(sparse.packed.numpy()))
        tensors[f"{prefix}weight"] = weight
        del tensors[f"{prefix}packed"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        return put_module(model, name, layer)
    tensors[f"{prefix}packed"] = sparse.packed
    return put_module(model, name, sparse)


def _skeleton(folder: Path, manifest: dict[str, Any]) -> nn.Module:
    """An empty Hugging Face model of the saved class and sizes: parameters on meta, buffers computed."""
    import transformers

    from secateur.torch.files.from_pretrained_hook import start_config  # it imports transformers, which is optional

    cls: Any = getattr(transformers, manifest["class"], None)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or not (folder / "config.json").exists():
        raise ModelError(f"{manifest['class']} cannot be built from {folder}: pass a skeleton, load(folder, model=...)")
    changes = C.Changes.from_json(manifest.get("changes") or {})
    read_json(folder / "config.json", remedy=AGAIN)
    try:
        config = start_config(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False), changes)
        with parameters_on_meta():
            model = cls(config)
        C.apply(model, changes, is_size)
        C.take_buffers(model, changes)
        C.set_configs(model, changes)
    except ModelError:
        raise
    except EXPECTED as error:
        raise ModelError(f"{manifest['class']} cannot be built from {folder} ({in_a_line(error)}); {AGAIN}") from error
    remember(model, changes)
    attach(model)
    return model
