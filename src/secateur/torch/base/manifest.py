"""Changes: how a shrunk model differs from the model that its class and configuration build, as plain data.

A checkpoint of a shrunk model carries its Changes; `apply` replays them on a fresh skeleton, before weights load.
Changes name modules, sizes and attribute values, and no model class.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError, listed, shown

Value = Any  # None, bool, int, str, or lists of these
ATTRIBUTE = "_secateur_changes"
_BOUND = 2**31
"""Numbers of a manifest are smaller: they are sizes, positions and ids."""


@dataclass(frozen=True)
class Changes:
    """The difference to the stock model, by the names of the shrunk model.

    kept: module list -> old indices of the elements that remain; outer lists first, inner lists by their new numbers.
    shapes: parameter or persistent buffer -> shape.
    takes: non-persistent buffer -> kept positions of each dimension (None: all of them).
    attributes: module -> attribute -> value.
    configs: module -> key -> value, changed on its `config` for every module that shares that object.
    own_configs: module -> key -> value, changed on a copy of its `config` that only this module reads.
    base: path of a configuration inside the root configuration -> key -> the value that builds the stock skeleton.
    scales: module -> attribute -> value, for numbers that are no sizes (the epsilon of a norm over fewer channels).
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    takes: Mapping[str, tuple[tuple[int, ...] | None, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    own_configs: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    base: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(bool(getattr(self, f.name)) for f in fields(self))

    def to_json(self) -> dict[str, Any]:
        """The changes as JSON values; empty parts are left out."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: _as_json(part) for name, part in parts.items() if part}

    def checksum(self, tokens: Mapping[str, Any] | None = None) -> str:
        """A hash of the changes, with which a manifest says that nobody has edited them.

        tokens: the manifest's entry for a schedule of tokens, which the hash covers too; None where there is none.
        """
        covered = self.to_json() if tokens is None else {**self.to_json(), "tokens": tokens}
        return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, checksum: str | None, source: object, tokens: Mapping[str, Any] | None = None) -> None:
        """Raise ModelError when a manifest has another checksum than its changes; manifests of before have none."""
        if checksum is not None and checksum != self.checksum(tokens):
            raise ModelError(f"the manifest of {source} was changed after it was saved; save or copy the model again")

    @staticmethod
    def from_json(data: Any) -> "Changes":
        """Read what `to_json` wrote; a ModelError names the entry that is malformed."""
        if not isinstance(data, dict):
            raise ModelError(f"the manifest's changes are {type(data).__name__}, expected an object")
        readers: dict[str, Callable[[Any, str], Any]] = {
            "kept": _read_positions,
            "shapes": _read_sizes,
            "takes": _read_take,
            "attributes": _read_values,
            "configs": _read_values,
            "own_configs": _read_values,
            "base": _read_values,
            "scales": _read_scales,
        }
        unknown = sorted(set(data) - set(readers))
        if unknown:
            raise ModelError(f"the manifest has the unknown part {unknown[0]!r}; a newer secateur may read it")
        parts = {}
        for part, entries in data.items():
            if not isinstance(entries, dict):
                raise ModelError(f"the manifest's {part!r} is {type(entries).__name__}, expected an object")
            parts[part] = {name: readers[part](value, f"{part}[{name!r}]") for name, value in entries.items()}
        return Changes(**parts)

    def merge(self, later: "Changes") -> "Changes":
        """These changes and then `later` as one; `later` was made on the model that has these changes."""

        def moved(part: Mapping[str, Any]) -> dict[str, Any]:
            names = {name: renamed(name, later.kept) for name in part}
            return {new: part[name] for name, new in names.items() if new is not None}

        kept = dict(moved(self.kept))
        for path, indices in later.kept.items():
            kept[path] = tuple(kept[path][i] for i in indices) if path in kept else indices
        takes = moved(self.takes)
        for name, positions in later.takes.items():
            takes[name] = _compose(takes[name], positions) if name in takes else positions
        base = {path: dict(values) for path, values in later.base.items()}
        for path, values in self.base.items():
            base[path] = {**base.get(path, {}), **values}
        return Changes(
            kept,
            {**moved(self.shapes), **later.shapes},
            takes,
            _overlay(moved(self.attributes), later.attributes),
            _overlay(moved(self.configs), later.configs),
            _overlay(moved(self.own_configs), later.own_configs),
            base,
            _overlay(moved(self.scales), later.scales),
        )

    def fit(self, model: nn.Module, prefix: str = "", *, strict: bool = True) -> "Changes":
        """These changes under the names of `model`, which may lack or add a head around the base model `prefix`.

        strict: whether the model has the class that was saved, so that it must have every name. Otherwise changes to
        a head that the model does not have are left out.
        """
        if strict or not prefix:
            return self
        inner, has = prefix + ".", isinstance(getattr(model, prefix, None), nn.Module)
        names = [*self.shapes, *self.takes, *self.kept, *self.attributes, *self.scales]
        wrapped = any(name.startswith(inner) for name in names)

        def rename(name: str) -> str | None:
            if has and not wrapped:
                return inner + name if name else prefix
            return name.removeprefix(inner) if wrapped and not has and name != prefix else name

        present = {path for path, _ in model.named_modules()} | named_tensors(model).keys()
        moved = self._named(rename)
        return moved._named(lambda name: name if original(name, moved.kept) in present else None)

    def _named(self, rename: Callable[[str], str | None]) -> "Changes":
        def part(entries: Mapping[str, Any]) -> dict[str, Any]:
            pairs = ((rename(name), value) for name, value in entries.items())
            return {name: value for name, value in pairs if name is not None}

        return Changes(
            **{f.name: part(getattr(self, f.name)) for f in fields(self) if f.name != "base"}, base=self.base
        )


def renamed(name: str, kept: Mapping[str, Iterable[int]]) -> str | None:
    """The name of a module or parameter after elements of module lists were dropped; None if it was in one of them."""
    for path in sorted(kept, key=lambda path: path.count(".")):
        if name.startswith(path + "."):
            index, dot, rest = name[len(path) + 1 :].partition(".")
            indices = list(kept[path])
            if not index.isdigit() or int(index) not in indices:
                return None
            name = f"{path}.{indices.index(int(index))}{dot}{rest}"
    return name


def original(name: str, kept: Mapping[str, tuple[int, ...]]) -> str:
    """The name before elements of module lists were dropped: the inverse of `renamed`."""
    for path in sorted(kept, key=lambda path: -path.count(".")):
        if name.startswith(path + "."):
            index, dot, rest = name[len(path) + 1 :].partition(".")
            if index.isdigit() and int(index) < len(kept[path]):
                name = f"{path}.{kept[path][int(index)]}{dot}{rest}"
    return name


def changes_of(model: nn.Module) -> Changes:
    """What resizing or loading has changed in a model so far; empty for a stock model."""
    return vars(model).get(ATTRIBUTE) or Changes()


def remember(model: nn.Module, changes: Changes) -> None:
    """Keep the changes with the model, where `changes_of` finds them."""
    vars(model)[ATTRIBUTE] = changes


def apply(model: nn.Module, changes: Changes, allowed: Callable[[str], bool]) -> None:
    """Give a stock skeleton the structure that `changes` describe, in place; the new tensors are uninitialised.

    Non-persistent buffers keep their size until `take_buffers`, and configurations keep their numbers until
    `set_configs`, so that the model can first compute what follows from them (rotary frequencies from hidden / heads).

    allowed: whether an attribute of that name may be set.

    Raises:
        ModelError: when the changes do not fit the model.
    """
    drop(model, changes.kept)
    tensors = named_tensors(model)
    replaced: dict[int, torch.Tensor] = {}
    for name, shape in changes.shapes.items():
        if name not in tensors:
            raise ModelError(f"the manifest sizes {listed([name])}, which {type(model).__name__} does not have")
        old = tensors[name]
        if len(shape) != old.dim() or any(n > m for n, m in zip(shape, old.shape, strict=True)):
            raise ModelError(f"the manifest gives {name} the shape {shape}, which does not fit {tuple(old.shape)}")
        if id(old) not in replaced:
            replaced[id(old)] = like(old, torch.empty(shape, dtype=old.dtype, device=old.device))
        put(model, name, replaced[id(old)])
    set_attributes(model, changes, allowed)


def take_buffers(model: nn.Module, changes: Changes) -> None:
    """Take the kept positions of non-persistent buffers, which are computed rather than loaded; in place."""
    tensors, loaded = named_tensors(model), model.state_dict().keys()
    for name, positions in changes.takes.items():
        if name in loaded:
            raise ModelError(f"the manifest takes from {name}, which is loaded and not computed; save the model again")
        if name not in tensors or len(positions) != tensors[name].dim():
            raise ModelError(f"the manifest takes from {name}, which {type(model).__name__} does not have")
        put(model, name, select(tensors[name], positions))


def drop(model: nn.Module, kept: Mapping[str, tuple[int, ...]]) -> None:
    """Drop elements of module lists, outer lists first; ModelError for a list or an index that does not exist."""
    for path in sorted(kept, key=lambda path: path.count(".")):
        modules = submodule(model, path)
        indices = kept[path]
        if not isinstance(modules, nn.ModuleList | nn.Sequential):
            raise ModelError(f"{path} is a {type(modules).__name__}; only elements of module lists can be dropped")
        if list(indices) != sorted(set(indices)) or (indices and indices[-1] >= len(modules)):
            raise ModelError(f"{path} has {len(modules)} elements; {list(indices)} cannot be what remains of them")
        elements = list(modules)
        modules._modules = {str(new): elements[old] for new, old in enumerate(indices)}


def set_attributes(model: nn.Module, changes: Changes, allowed: Callable[[str], bool]) -> None:
    """Set the attributes of `changes`; ModelError for names that are not sizes."""
    for path, values in changes.attributes.items():
        module = submodule(model, path)
        for name, value in values.items():
            if not allowed(name) or not hasattr(module, name):
                raise ModelError(f"the manifest sets {name!r} of {path or 'the model'}, which is no size it has")
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    for path, scales in changes.scales.items():
        module = submodule(model, path)
        for name, value in scales.items():
            if type(vars(module).get(name)) is not float:
                raise ModelError(f"the manifest sets {name!r} of {path or 'the model'}, which is no number it has")
            setattr(module, name, value)


def set_configs(model: nn.Module, changes: Changes) -> None:
    """Set the configuration values of `changes`; ModelError for values that a configuration does not have."""
    for path, values in changes.configs.items():
        _set_config(submodule(model, path), path, values)
    for path, values in changes.own_configs.items():
        module = submodule(model, path)
        module.config = copy.copy(_config(module, path))
        _set_config(module, path, values)


def _config(module: nn.Module, path: str) -> Any:
    config = getattr(module, "config", None)
    if config is None:
        raise ModelError(f"the manifest configures {path or 'the model'}, which has no config")
    return config


def _set_config(module: nn.Module, path: str, values: Mapping[str, Value]) -> None:
    set_config(_config(module, path), values, path)


def set_config(config: Any, values: Mapping[str, Value], path: str = "") -> None:
    """Set numbers and lists that a configuration already has; ModelError for other keys or kinds of value."""
    for key, value in values.items():
        old = getattr(config, key, None)
        numbers = isinstance(old, int) and not isinstance(old, bool) and type(value) is int
        if not numbers and not (isinstance(old, list | tuple) and isinstance(value, list | tuple)):
            raise ModelError(f"the manifest sets {shown(key)} in the config of {path or 'the model'} to {shown(value)}")
        setattr(config, key, list(value) if isinstance(value, list | tuple) else value)


# -- tensors of a module ------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def select(tensor: torch.Tensor, positions: Iterable[Iterable[int] | None]) -> torch.Tensor:
    """Index-select every dimension that has positions; the result is contiguous and shares no memory."""
    taken = tensor.detach()
    for dim, index in enumerate(positions):
        if index is not None:
            indices = list(index)
            if indices and max(indices) >= taken.shape[dim]:
                raise ModelError(f"position {max(indices)} is outside a dimension of {taken.shape[dim]}")
            taken = taken.index_select(dim, torch.as_tensor(indices, dtype=torch.long, device=tensor.device))
    return taken.contiguous()


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new` as a parameter, with the attributes of `old`, when `old` is a parameter; else `new` itself."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update({k: v for k, v in old.__dict__.items() if not k.startswith("_backward")})
    return new


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = submodule(model, path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; ModelError when there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"the manifest names the module {path!r}, which {type(model).__name__} lacks") from None


# -- JSON ---------------------------------------------------------------------------------------------------------


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _read_sizes(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(n) is not int or not 0 <= n < _BOUND for n in value):
        raise ModelError(f"the manifest's {where} is {_short(value)}, expected a list of non-negative integers")
    return tuple(value)


def _read_positions(value: Any, where: str) -> tuple[int, ...]:
    positions = _read_sizes(value, where)
    if any(a >= b for a, b in itertools.pairwise(positions)):
        raise ModelError(f"the manifest's {where} lists positions twice or out of order; save the model again")
    return positions


def _read_take(value: Any, where: str) -> tuple[tuple[int, ...] | None, ...]:
    if not isinstance(value, list):
        raise ModelError(f"the manifest's {where} is {_short(value)}, expected a list")
    return tuple(None if part is None else _read_positions(part, where) for part in value)


def _read_values(value: Any, where: str) -> dict[str, Value]:
    if not isinstance(value, dict):
        raise ModelError(f"the manifest's {where} is {_short(value)}, expected an object")
    for key, item in value.items():
        for element in item if isinstance(item, list) else [item]:
            if not (
                element is None or isinstance(element, str) or (isinstance(element, int) and abs(element) < _BOUND)
            ):
                raise ModelError(f"the manifest's {where} sets {key!r} to {_short(item)}, expected integers")
    return value


def _read_scales(value: Any, where: str) -> dict[str, float]:
    numbers = value.values() if isinstance(value, dict) else [None]
    if any(type(n) is not float or not 0 < n < 1 for n in numbers):
        raise ModelError(f"the manifest's {where} is {_short(value)}, expected numbers between 0 and 1")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _compose(
    first: tuple[tuple[int, ...] | None, ...], then: tuple[tuple[int, ...] | None, ...]
) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(
        b if a is None else a if b is None else tuple(a[i] for i in b) for a, b in zip(first, then, strict=True)
    )


def _overlay(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    result = {name: dict(values) for name, values in under.items()}
    for name, values in over.items():
        result[name] = {**result.get(name, {}), **values}
    return result
