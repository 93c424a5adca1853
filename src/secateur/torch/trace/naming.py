"""Readable names for traced axes, from where their parameters stand in the module tree."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from secateur.torch.trace.axis_kinds import ANONYMOUS, AxisDraft

_WHOLE_MODEL = ("hidden", "vocab", "embedding")


def shown(axis: AxisDraft) -> bool:
    """Whether an axis gets a name; what cannot be pruned and says nothing is printed as a number."""
    return axis.kind != ANONYMOUS


def head_name(kv: str) -> str:
    """The name of the query heads whose first part is the axis `kv`."""
    return kv[: -len("kv")] + "head" if kv.endswith("kv") else f"{kv}.head"


def name_axes(axes: Sequence[AxisDraft], lists: Mapping[str, int]) -> dict[int, str]:
    """Names by the identity of the atom. `lists` are the module lists of like layers -> their length."""
    stacks = _stack_names(axes, lists)
    named: dict[int, str] = {}
    taken: dict[str, AxisDraft] = {}
    for axis in axes:
        if not shown(axis):
            continue
        for candidate in _candidates(axis, stacks, lists):
            reserved = [candidate, head_name(candidate)] if axis.kind == "kv" else [candidate]
            if not any(name in taken for name in reserved):
                taken.update(dict.fromkeys(reserved, axis))
                named[id(axis.atom)] = candidate
                break
    return named


def _split(param: str, lists: Mapping[str, int]) -> tuple[str, int, str] | None:
    """(list, index, rest) of a parameter that stands in the outermost module list of layers."""
    parts = param.split(".")
    for i in range(1, len(parts)):
        path = ".".join(parts[:i])
        if path in lists and parts[i].isdigit():
            return path, int(parts[i]), ".".join(parts[i + 1 :])
    return None


def _stack_names(axes: Sequence[AxisDraft], lists: Mapping[str, int]) -> dict[str, str]:
    """What tells the layer lists of a model apart: '' when there is only one."""
    used: dict[str, None] = {}
    for axis in axes:
        if shown(axis):
            for param in axis.params:
                where = _split(param, lists)
                if where:
                    used[where[0]] = None
    paths = [p.split(".") for p in used]
    if len(paths) < 2:
        return dict.fromkeys(used, "")
    while all(len(p) > 1 for p in paths) and len({p[0] for p in paths}) == 1:
        paths = [p[1:] for p in paths]
    while all(len(p) > 1 for p in paths) and len({p[-1] for p in paths}) == 1:
        paths = [p[:-1] for p in paths]
    return {path: ".".join(short) for path, short in zip(used, paths, strict=True)}


def _candidates(axis: AxisDraft, stacks: Mapping[str, str], lists: Mapping[str, int]) -> list[str]:
    """Names from the shortest to one that is certainly free."""
    kind = axis.kind
    places = [_split(param, lists) for param in axis.params]
    inside = [place for place in places if place]
    first = axis.params[0]
    result: list[str] = []
    one_stack = len({p[0] for p in inside}) == 1
    if kind in _WHOLE_MODEL or not one_stack:
        result.append(kind)
        result += [f"{stacks[inside[0][0]]}.{kind}"] if one_stack and stacks[inside[0][0]] else []
        prefix = _common_module(axis.params)
        result += [f"{prefix}.{kind}"] if prefix else []
    elif len({p[1] for p in inside}) > 1 or len(inside) < len(places):
        stack = stacks[inside[0][0]]
        base = f"{stack}." if stack else ""
        result.append(f"{base}{kind}")
        result += [f"{base}{module}.{kind}" for module in _modules(inside[0][2])]
    else:
        path, index, rest = inside[0]
        base = ".".join(part for part in (stacks[path], f"L{index}") if part)
        inner = _numbered(rest, path, index, lists)
        base = f"{base}.{inner}" if inner else base
        result.append(f"{base}.{kind}")
        modules = [*_modules(_common_module([p[2] for p in inside]) + ".weight"), *_modules(rest)]
        result += [f"{base}.{m}.{kind}" for m in modules if m not in inner.split(".")]
    result.append(f"{first.rsplit('.', 1)[0]}.{kind}")
    result += [f"{result[0]}{i}" for i in range(2, 1000)]
    return [re.sub(r"[\s()+<:=@#]", "_", name) for name in result]


def _modules(rest: str) -> list[str]:
    """Names of the modules on the way to a parameter inside a layer; positions in lists are left out."""
    parts = [*rest.split(".")[:-1], ""]
    return [p for p, after in pairwise(parts) if p and not (p.isdigit() or after.isdigit())]


def _numbered(rest: str, path: str, index: int, lists: Mapping[str, int]) -> str:
    """Lists of like modules inside a layer (blocks of a stage, experts): `blocks.1`."""
    parts, found = rest.split("."), []
    for i, part in enumerate(parts):
        if part.isdigit() and lists.get(f"{path}.{index}." + ".".join(parts[:i]), 0) > 1:
            found += [parts[i - 1], part]
    return ".".join(found)


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
