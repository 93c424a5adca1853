"""Readable names for traced axes, from the paths of their parameters in the module tree."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from secateur.torch.trace.axis_kinds import ANONYMOUS, AxisDraft

_WHOLE_MODEL = ("hidden", "vocab", "embedding")


class _InLayer(NamedTuple):
    """A parameter inside a layer.

    stack: path of the outermost module list of layers that holds it.
    layer: position of the layer in that list.
    rest: path of the parameter inside the layer.
    """

    stack: str
    layer: int
    rest: str


def shown(axis: AxisDraft) -> bool:
    """Whether an axis gets a name; layouts print a number for an axis that cannot be pruned and has no kind."""
    return axis.kind != ANONYMOUS


def head_name(kv: str) -> str:
    """The name of the query heads whose first part is the axis `kv`."""
    return kv[: -len("kv")] + "head" if kv.endswith("kv") else f"{kv}.head"


def name_axes(axes: Sequence[AxisDraft], lists: Mapping[str, int]) -> dict[int, str]:
    """Names by the identity of the atom. lists: path of each module list of like layers -> its length."""
    stacks = _stack_names(axes, lists)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for axis in axes:
        if not shown(axis):
            continue
        for candidate in _candidates(axis, stacks, lists):
            reserved = {candidate, head_name(candidate)} if axis.kind == "kv" else {candidate}
            if not taken & reserved:
                taken |= reserved
                names[id(axis.atom)] = candidate
                break
    return names


def _in_layer(param: str, lists: Mapping[str, int]) -> _InLayer | None:
    """Where a parameter stands in the outermost module list of layers; None outside of such lists."""
    parts = param.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if path in lists and parts[i].isdigit():
            return _InLayer(path, int(parts[i]), ".".join(parts[i + 1 :]))
    return None


def _stack_names(axes: Sequence[AxisDraft], lists: Mapping[str, int]) -> dict[str, str]:
    """Path of each module list that holds named axes -> what distinguishes it: '' when there is only one."""
    params = [param for axis in axes if shown(axis) for param in axis.params]
    used = list(dict.fromkeys(where.stack for param in params if (where := _in_layer(param, lists))))
    if len(used) < 2:
        return dict.fromkeys(used, "")
    return {path: ".".join(words) for path, words in zip(used, distinguish(used), strict=True)}


def distinguish(paths: Sequence[str]) -> list[list[str]]:
    """The words of each module path without those that all paths begin or end with; at least one word a path."""
    split = [path.split(".") for path in paths]
    while all(len(words) > 1 for words in split) and len({words[0] for words in split}) == 1:
        split = [words[1:] for words in split]
    while all(len(words) > 1 for words in split) and len({words[-1] for words in split}) == 1:
        split = [words[:-1] for words in split]
    return split


def _candidates(axis: AxisDraft, stacks: Mapping[str, str], lists: Mapping[str, int]) -> list[str]:
    """Names from the shortest to one that is certainly free."""
    inside = [where for param in axis.params if (where := _in_layer(param, lists))]
    stack = stacks[inside[0].stack] if len({where.stack for where in inside}) == 1 else None
    if axis.kind in _WHOLE_MODEL or stack is None:
        names = _names_in_model(axis, stack)
    elif len({where.layer for where in inside}) > 1 or len(inside) < len(axis.params):
        modules = ["", *_modules(inside[0].rest)]
        names = [_joined(stack, module, axis.kind) for module in modules]
    else:
        names = _names_in_layer(axis.kind, stack, inside, lists)
    names.append(f"{axis.params[0].rsplit('.', 1)[0]}.{axis.kind}")
    names += [f"{names[0]}{i}" for i in range(2, 1000)]
    return [re.sub(r"[\s()+<:=@#]", "_", name) for name in names]


def _joined(*words: str) -> str:
    return ".".join(word for word in words if word)


def _names_in_model(axis: AxisDraft, stack: str | None) -> list[str]:
    """Names of an axis of the whole model, or of several stacks."""
    return [axis.kind, *[f"{prefix}.{axis.kind}" for prefix in (stack, _common_module(axis.params)) if prefix]]


def _names_in_layer(kind: str, stack: str, inside: Sequence[_InLayer], lists: Mapping[str, int]) -> list[str]:
    """Names of an axis of one layer: `L0.ffn`, with modules inside the layer where that is taken."""
    first = inside[0]
    inner = _numbered(first, lists)
    base = _joined(stack, f"L{first.layer}", inner)
    modules = [*_modules(_common_module([where.rest for where in inside]) + ".weight"), *_modules(first.rest)]
    return [f"{base}.{kind}", *[f"{base}.{module}.{kind}" for module in modules if module not in inner.split(".")]]


def _modules(rest: str) -> list[str]:
    """Names of the modules on the way to a parameter inside a layer; positions in lists are left out."""
    parts = [*rest.split(".")[:-1], ""]
    return [p for p, after in pairwise(parts) if p and not (p.isdigit() or after.isdigit())]


def _numbered(param: _InLayer, lists: Mapping[str, int]) -> str:
    """Lists of like modules inside a layer (blocks of a stage, experts): `blocks.1`."""
    parts = param.rest.split(".")
    words: list[str] = []
    for i, part in enumerate(parts):
        if part.isdigit() and lists.get(f"{param.stack}.{param.layer}." + ".".join(parts[:i]), 0) > 1:
            words += [parts[i - 1], part]
    return ".".join(words)


def _common_module(params: Sequence[str]) -> str:
    """The longest module path that holds all the parameters."""
    split = [p.split(".")[:-1] for p in params]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def group_lists(lists: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Module lists whose elements are of one type, with their length."""
    return {path: len(types) for path, types in lists.items() if len(set(types)) == 1}
