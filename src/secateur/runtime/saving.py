"""Saves a compiled model with its packed weights and maps it back into memory: no dense copy is made at load.

A folder holds `runtime.safetensors` (every tensor; packed weights as they lie in memory), `runtime.json` (which modules
are packed, and what was removed from the stock model) and, for Hugging Face models, their `config.json`, from which the
skeleton is built.
"""

from __future__ import annotations

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
from secateur.kernels.packing import unpack, validate
from secateur.runtime.compile_model import put_module, share_copy
from secateur.runtime.layers.attention import use_attention
from secateur.runtime.layers.fused import from_json, one_calls, to_json, use_one_call
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from secateur.runtime.run.chain import ChainProgram, chains_of, use_chains
from secateur.runtime.run.decoder_step import DecoderProgram, decoders_of, use_decoders
from secateur.torch.base import manifest as C
from secateur.torch.base.manifest import changes_of, remember
from secateur.torch.files.saving import attach, read_json
from secateur.torch.shrink.size_attributes import is_size

WEIGHTS, MANIFEST = "runtime.safetensors", "runtime.json"
FORMAT_VERSION = 2
PARTS = {"class": str, "packed": dict, "identities": list, "aliases": dict}
"""What every manifest holds."""


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a compiled model to `folder`, whole or not at all.

    Raises:
        SecateurError: when the model has no packed layer, so that there is nothing this format would help; when the
            folder exists (unless `overwrite`) or cannot be written.
    """
    packed = {name: module.activation for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not packed:
        raise ModelError("the model has no packed layer: compile it with secateur.runtime.compile first")
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
        if place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().contiguous()
    manifest = {
        "version": FORMAT_VERSION,
        "class": type(model).__name__,
        "packed": packed,
        "by_tokens": {name: m.tokens for name, m in model.named_modules() if isinstance(m, ByTokens)},
        "one_calls": {name: to_json(one) for name, one in one_calls(model).items()},
        "chains": {name: [asdict(plan) for plan in plans] for name, plans in chains_of(model).items()},
        "decoders": {name: asdict(plan) for name, plan in decoders_of(model).items()},
        # Activations that were fused into a packed layer: the skeleton has them still.
        "identities": [name for name, module in model.named_modules() if type(module) is nn.Identity],
        "aliases": aliases,
        "changes": changes_of(model).to_json(),
    }
    config = getattr(model, "config", None)
    with new_folder(Path(folder), overwrite=overwrite) as temporary:
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(temporary)
        save_file(tensors, temporary / WEIGHTS)
        write_json(temporary / MANIFEST, manifest)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a model that `save` wrote, in eval mode; its tensors are views of the mapped file.

    Without compiled kernels packed layers become dense ones.

    Args:
        folder: where `save` wrote to.
        model: a skeleton of the same architecture and sizes (weights are ignored; it may lie on the meta device).
            Not needed for Hugging Face models, those with removed units included.

    Raises:
        ModelError: when the folder holds no saved runtime model, is damaged, or does not fit the skeleton.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists() or not (folder / WEIGHTS).exists():
        raise ModelError(f"{folder} holds no {MANIFEST} and {WEIGHTS}: write them with secateur.runtime.save")
    manifest = _read_manifest(folder / MANIFEST)
    model = _skeleton(folder, manifest) if model is None else share_copy(model)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged or cut short ({error}); save or copy it again") from None
    for name, source in manifest["aliases"].items():
        if source not in tensors:
            raise ModelError(f"{folder / WEIGHTS} lacks {source}; save or copy the model again")
        tensors[name] = tensors[source]
    for name, tokens in manifest.get("by_tokens", {}).items():
        model = _put_forms(model, name, tokens)
    for name, activation in manifest["packed"].items():
        model = _put_packed(model, name, activation, tensors)
    for name in manifest["identities"]:
        put_module(model, name, nn.Identity())
    for name, one in manifest.get("one_calls", {}).items():
        try:
            use_one_call(_layer(model, name), from_json(one))
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{folder / MANIFEST} is damaged: {name!r} is {one!r} ({error})") from None
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{folder} does not fit the model: {error}") from error
    if missing or unexpected:
        raise ModelError(
            f"{folder} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}; pass the skeleton "
            "that was saved"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    use_attention(model)
    model.eval()
    for name, plans in manifest.get("chains", {}).items() if load_native() is not None else ():
        try:
            use_chains(_layer(model, name), [ChainProgram.from_json(plan) for plan in plans])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ModelError(f"{folder / MANIFEST} is damaged: the chains of {name!r} do not fit ({error})") from None
    if load_native() is not None:
        try:
            use_decoders(
                model, {name: DecoderProgram.from_json(plan) for name, plan in manifest.get("decoders", {}).items()}
            )
        except (TypeError, LookupError, AttributeError, ValueError, OverflowError) as error:
            raise ModelError(f"{folder / MANIFEST} is damaged: its decoders do not fit ({error})") from None
    return model


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    if manifest.get("version") != FORMAT_VERSION:
        raise ModelError(f"{path} has version {manifest.get('version')}, this secateur reads {FORMAT_VERSION}")
    wrong = next((name for name, kind in PARTS.items() if not isinstance(manifest.get(name), kind)), None)
    if wrong is not None:
        raise ModelError(f"{path} is damaged: {wrong!r} is {manifest.get(wrong)!r}; save or copy it again")
    return manifest


def _put_forms(model: nn.Module, name: str, tokens: list[int]) -> nn.Module:
    """The skeleton with a layer as often as it was saved, each to be filled with its own form."""
    forms = ByTokens([share_copy(_layer(model, name)) for _ in tokens], tokens)
    if not name:
        return forms
    put_module(model, name, forms)
    return model


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no layer {name!r}; pass the skeleton that was saved") from error


def _put_packed(model: nn.Module, name: str, activation: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    prefix = f"{name}." if name else ""
    packed = tensors.get(f"{prefix}packed")
    if packed is None:
        raise ModelError(f"the file lacks the packed weight of layer {name!r}; save the model again")
    if packed.data_ptr() % 8:
        packed = packed.clone()
    try:
        validate(packed.numpy())
    except ValueError as error:
        raise ModelError(f"layer {name!r}: {error}") from error
    bias = tensors.get(f"{prefix}bias")
    if load_native() is not None or activation != "none":
        tensors[f"{prefix}packed"] = packed
        layer: nn.Module = SparseLinear(packed, bias, activation)
    else:
        weight = torch.from_numpy(unpack(packed.numpy()))
        tensors[f"{prefix}weight"] = weight
        del tensors[f"{prefix}packed"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    if not name:
        return layer
    old = _layer(model, name)
    rows_cols = (
        getattr(old, "out_features", getattr(old, "nf", None)),
        getattr(old, "in_features", getattr(old, "nx", None)),
    )
    if isinstance(layer, SparseLinear) and rows_cols != (layer.out_features, layer.in_features):
        raise ModelError(
            f"layer {name!r} is {rows_cols} in the model but {(layer.out_features, layer.in_features)} in the file"
        )
    put_module(model, name, layer)
    return model


def _skeleton(folder: Path, manifest: dict[str, Any]) -> nn.Module:
    """An empty Hugging Face model of the saved class and sizes: parameters on meta, buffers computed as usual."""
    import transformers

    from secateur.torch.files.from_pretrained_hook import start_config
    from secateur.torch.stream.lazy_model import parameters_on_meta

    cls = getattr(transformers, manifest["class"], None)
    if cls is None or not (folder / "config.json").exists():
        raise ModelError(f"{manifest['class']} cannot be built from {folder}: pass a skeleton, load(folder, model=...)")
    changes = C.Changes.from_json(manifest.get("changes") or {})
    read_json(folder / "config.json")
    config = start_config(transformers.AutoConfig.from_pretrained(folder), changes)
    with parameters_on_meta():
        model = cls(config)
    C.apply(model, changes, is_size)
    C.take_buffers(model, changes)
    C.set_configs(model, changes)
    remember(model, changes)
    attach(model)
    return model
