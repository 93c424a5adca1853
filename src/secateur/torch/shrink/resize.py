"""Physically shrink a PyTorch model to the units that a plan keeps: tensors, module lists, attributes and configs."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.dims import extent, names
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.torch.base import manifest
from secateur.torch.base.expected_errors import EXPECTED, in_a_line
from secateur.torch.base.manifest import Changes, changes_of, remember
from secateur.torch.shrink.method_reads import powers
from secateur.torch.shrink.norms import epsilons, rescale, shrinking
from secateur.torch.shrink.size_attributes import LAYER_INDEX, MEANING, is_size, mirrors
from secateur.torch.shrink.vocabulary import follow, kept_tokens, token_numbers

logger = logging.getLogger(__name__)
LAYER_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "num_blocks",
    "num_encoder_layers",
    "encoder_layers",
    "encoder_num_hidden_layers",
    "num_decoder_layers",
    "decoder_layers",
    "decoder_num_hidden_layers",
)


def resize(model: nn.Module, layout: Layout, keep: Mapping[str, Sequence[int] | np.ndarray]) -> Changes:
    """Remove every unit that `keep` does not list from `model`, in place.

    Parameters and buffers become new tensors (same dtype, device and `requires_grad`; tied ones stay tied), so an
    optimizer made before must be made anew. Axes without an entry in `keep` stay whole. Returns what this call changed;
    `changes_of(model)` is everything in which the model now differs from what its class builds.

    Raises PlanError when `keep` does not fit the layout, ModelError when the layout does not fit the model or when a
    Python attribute that the forward pass reads has no single new value; the model is then unchanged.
    """
    checked = layout.check_keep({name: np.asarray(units) for name, units in keep.items()})
    step, kept = plan_changes(model, layout, checked)
    total = changes_of(model).merge(step)
    check_unquantized(model)
    tokens = kept_tokens(layout, checked)
    generation = getattr(model, "generation_config", None)
    numbers = token_numbers(generation, *tokens) if tokens and generation is not None else {}
    rescale(model, shrinking(model, layout, checked))
    _take(model, layout, kept)
    manifest.drop(model, step.kept)
    manifest.set_attributes(model, step, is_size)
    manifest.set_configs(model, step)
    remember(model, total)
    if tokens:
        follow(model, tokens[1], numbers)
    return step


def check_unquantized(model: nn.Module) -> None:
    """ModelError when the model is quantized, so that its config has no room for the manifest of what was changed."""
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    method = other.get("quant_method") if isinstance(other, Mapping) else getattr(other, "quant_method", None)
    if other is not None and method != "secateur":
        name = getattr(method, "value", method)
        raise ModelError(f"the model is quantized with {name}; prune the unquantized model, then quantize that")


def plan_changes(
    model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]
) -> tuple[Changes, dict[str, list[np.ndarray | None] | None]]:
    """The changes that removal makes, and what is kept of each parameter of the layout; the model is not changed."""
    tensors = manifest.named_tensors(model)
    sizes = _checked_sizes(model, layout, keep)
    kept = {name: layout.kept(name, keep) for name in layout.params}
    lists = _lists(layout, keep)
    attributes, own_configs = mirrors(model, layout, sizes, kept)
    for path, indices, kind in lists:
        if kind == "layer":
            _renumber(model, path, indices, attributes)
    configs, base = _configs(model, layout, sizes, lists, kept_tokens(layout, keep))

    moves: dict[str, tuple[int, ...]] = {}
    for path, indices, _ in sorted(lists, key=lambda entry: entry[0].count(".")):
        moved = manifest.renamed(path, moves)
        if moved is not None:
            moves[moved] = indices

    def surviving(entries: Mapping[str, Any]) -> dict[str, Any]:
        pairs = ((manifest.renamed(name, moves), value) for name, value in entries.items())
        return {name: value for name, value in pairs if name is not None}

    shapes, takes = _shapes(model, layout, tensors, kept)
    return (
        Changes(
            moves,
            surviving(shapes),
            surviving(takes),
            surviving(attributes),
            surviving(configs),
            surviving(own_configs),
            base,
            surviving(epsilons(model, shrinking(model, layout, keep))),
        ),
        kept,
    )


def _checked_sizes(model: nn.Module, layout: Layout, keep: Mapping[str, np.ndarray]) -> dict[str, int]:
    """`new_sizes`; ModelError when the layout does not fit the model, or shapes after removal do not fit the sizes."""
    tensors = manifest.named_tensors(model)
    layout.check({name: tuple(t.shape) for name, t in tensors.items()})
    missing = next((name for name in layout.params if name not in tensors), None)
    if missing:
        raise ModelError(f"the layout describes {missing}, which {type(model).__name__} does not have")
    sizes = new_sizes(layout, keep)
    for name, dims in layout.params.items():
        shape = layout.kept_shape(name, keep)
        if shape is not None and shape != tuple(extent(dim, sizes) for dim in dims):
            raise ModelError(f"{name} would become {shape}, but its axes say {tuple(extent(d, sizes) for d in dims)}")
    return sizes


def new_sizes(layout: Layout, keep: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Size of each axis after removal; axes that are parts of a pruned product shrink with it."""
    sizes = {name: len(keep[name]) if name in keep else axis.size for name, axis in layout.axes.items()}
    for name, axis in layout.axes.items():
        if not axis.parts:
            continue
        outer, inner = axis.parts[0], axis.parts[-1]
        if name in keep:
            if len(axis.parts) != 2:
                raise ModelError(f"axis {name} is a product of {len(axis.parts)} axes; only two can be resized")
            units = keep[name]
            if outer in keep:
                units = units[np.isin(units // layout.axes[inner].size, keep[outer])]
            sizes[inner] = len(units) // max(sizes[outer], 1)
        sizes[name] = math.prod([sizes[part] for part in axis.parts])
    return sizes


def _lists(layout: Layout, keep: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, ...], str]]:
    """Module lists that lose elements: (path, kept indices, kind of axis)."""
    lists = []
    for name, units in keep.items():
        axis = layout.axes[name]
        if axis.path is not None and len(units) < axis.size:
            lists.append((axis.path, tuple(int(i) for i in units), axis.kind))
    return lists


def _shapes(
    model: nn.Module,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    kept: Mapping[str, list[np.ndarray | None] | None],
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[tuple[int, ...] | None, ...]]]:
    """New shapes of parameters and persistent buffers, and kept positions of the other buffers, by old names."""
    aliases = _aliases(layout, tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    takes: dict[str, tuple[tuple[int, ...] | None, ...]] = {}
    for name, dims in kept.items():
        if dims is None or all(d is None or d.all() for d in dims):
            continue
        shape = tuple(n if d is None else int(d.sum()) for n, d in zip(tensors[name].shape, dims, strict=True))
        for alias in aliases[name]:
            if _persistent(model, alias):
                shapes[alias] = shape
            else:
                takes[alias] = tuple(None if d is None else tuple(np.flatnonzero(d).tolist()) for d in dims)
    return shapes, takes


def _aliases(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """All names that each parameter of the layout has in the model."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_id.setdefault(id(tensor), []).append(name)
    aliases = {name: list(by_id[id(tensors[name])]) for name in layout.params}
    for alias, name in layout.tied.items():
        if alias in tensors and alias not in aliases[name]:
            aliases[name].append(alias)
    return aliases


def _persistent(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(path)._non_persistent_buffers_set


def _take(model: nn.Module, layout: Layout, kept: Mapping[str, list[np.ndarray | None] | None]) -> None:
    """Replace each tensor, under all its names, by the positions that are kept of it."""
    tensors = manifest.named_tensors(model)
    aliases = _aliases(layout, tensors)
    done: dict[int, torch.Tensor] = {}
    for name, dims in kept.items():
        if dims is None or all(d is None or d.all() for d in dims):
            continue
        positions = [None if d is None else np.flatnonzero(d).tolist() for d in dims]
        for alias in aliases[name]:
            old = tensors[alias]
            if id(old) not in done:
                done[id(old)] = manifest.like(old, manifest.select(old, positions))
            manifest.put(model, alias, done[id(old)])


def _renumber(model: nn.Module, path: str, indices: tuple[int, ...], attributes: dict[str, dict[str, Any]]) -> None:
    """Renumber the layer indices that modules hold for caches: element i becomes element `indices.index(i)`."""
    for new, old in enumerate(indices):
        element = f"{path}.{old}"
        for inner, module in model.get_submodule(element).named_modules():
            for name in LAYER_INDEX:
                if old != new and vars(module).get(name) == old and type(vars(module)[name]) is int:
                    attributes.setdefault(f"{element}.{inner}" if inner else element, {})[name] = new


# -- configuration numbers that hold for a whole model ------------------------------------------------------------


def _configs(
    model: nn.Module,
    layout: Layout,
    sizes: Mapping[str, int],
    lists: list[tuple[str, tuple[int, ...], str]],
    tokens: tuple[int, np.ndarray] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Numbers of layers, hidden width, vocabulary and experts in configs.

    Returns the new values by module path, and the old values by path inside the root configuration.
    """
    configs: dict[str, dict[str, Any]] = {}
    base: dict[str, dict[str, Any]] = {}
    paths = {id(config): path for path, config in _config_tree(getattr(model, "config", None))}
    for owner, config in _config_owners(model):
        layers = _layer_numbers(config, owner, model, lists)
        wide = _wide_numbers(config, owner, model, layout, sizes)
        if tokens and getattr(config, "vocab_size", None) == tokens[0]:
            wide |= token_numbers(config, *tokens)
        changed = next((c for c in ({**wide, **layers}, layers, wide) if _valid(config, c)), {})
        if changed:
            configs[owner] = changed
            if id(config) in paths:
                old = {key: getattr(config, key) for key in changed}
                base[paths[id(config)]] = {k: list(v) if isinstance(v, tuple) else v for k, v in old.items()}
    return configs, base


def _valid(config: Any, changed: Mapping[str, Any]) -> bool:
    """Whether a configuration with these numbers can be saved and read.

    Some configurations demand that the number of heads divides the width, or that each layer has a name.
    """
    tried = copy.deepcopy(config)
    try:
        for key, value in changed.items():
            setattr(tried, key, value)
        getattr(tried, "validate", lambda: None)()
        type(tried).from_dict(tried.to_dict())
    except EXPECTED as error:
        logger.info("%s refuses %s (%s); its numbers stay", type(config).__name__, dict(changed), in_a_line(error))
        return False
    return True


def _config_owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each distinct Hugging Face configuration among the modules, with the outermost module that has it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = vars(module).get("config")
        if hasattr(config, "to_diff_dict") and id(config) not in seen:
            seen.add(id(config))
            yield path, config


def _config_tree(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not hasattr(config, "to_diff_dict"):
        return
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            yield from _config_tree(value, f"{path}.{name}" if path else name)


def _wide_numbers(
    config: Any, owner: str, model: nn.Module, layout: Layout, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Hidden width, vocabulary and experts, where all axes of that kind and size have the same new size.

    A width that the forward pass raises to a power is a scale as well; a scale must not follow, so it stays.
    """
    canonical = getattr(config, "attribute_map", None) or {}
    scales = {canonical.get(name, name) for m in model.get_submodule(owner).modules() for name in powers(type(m))}
    dims = [dim for param, dims in layout.params.items() if _is_below(param, owner) for dim in dims]
    axes = [layout.axes[name] for name in {name for dim in dims for name in names(dim)}]
    changed: dict[str, Any] = {}
    for key, meaning in MEANING.items():
        value = getattr(config, key, None)
        if meaning not in ("hidden", "vocab", "expert") or type(value) is not int or canonical.get(key, key) in scales:
            continue
        new = {sizes[axis.name] for axis in axes if axis.kind == meaning and axis.size == value}
        if len(new) == 1 and new != {value}:
            changed[key] = new.pop()
    return changed


def _is_below(path: str, owner: str) -> bool:
    """Whether the path of a module or parameter lies below the module `owner`; "" is the whole model."""
    return not owner or path.startswith(owner + ".")


def _layer_numbers(
    config: Any, owner: str, model: nn.Module, lists: list[tuple[str, tuple[int, ...], str]]
) -> dict[str, Any]:
    """The number of layers and the lists with one entry per layer, when layers of a stack below `owner` are removed."""
    changed: dict[str, Any] = {}
    for path, indices, kind in lists:
        if kind == "layer" and _is_below(path, owner):
            old = len(model.get_submodule(path))
            inner = path[len(owner) + 1 :] if owner else path
            changed |= {key: len(indices) for key in _count_keys(config, inner) if getattr(config, key) == old}
            changed |= {key: [value[i] for i in indices] for key, value in _lists_per_layer(config, old)}
    return changed


def _count_keys(config: Any, stack_path: str) -> list[str]:
    """Configuration keys that may count the layers of the stack at a path.

    Keys that name the encoder or decoder go before keys that do not; the latter count encoder layers too.
    """
    stack = next((side for side in ("decoder", "encoder") if side in stack_path), "")
    keys = [key for key in LAYER_COUNTS if type(getattr(config, key, None)) is int]
    special = [key for key in keys if stack and stack in key]
    generic = [key for key in keys if "encoder" not in key and "decoder" not in key]
    return special + generic if not special or stack == "encoder" else special


def _lists_per_layer(config: Any, layers: int) -> Iterator[tuple[str, Sequence[int | str]]]:
    """Keys and values of the configuration's lists that have one number or name for each layer."""
    for key, value in vars(config).items():
        names_layers = "layer" in key or "block" in key
        if not names_layers or not isinstance(value, list | tuple) or len(value) != layers:
            continue
        if all(isinstance(item, int | str) for item in value):
            yield key, value
