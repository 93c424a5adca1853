"""Layer axes: module lists whose elements pass one residual stream along, so that leaving one out is a bypass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from secateur.layout import Axis
from secateur.torch.trace.atoms import same_axes, size
from secateur.torch.trace.naming import distinguish
from secateur.torch.trace.propagate import Propagation
from secateur.torch.trace.values import Value


@dataclass(frozen=True)
class NotAStack:
    """The elements of a module list do not pass one stream along."""


@dataclass(frozen=True)
class Removable:
    """A stack of layers, each of which can be left out."""


@dataclass(frozen=True)
class Frozen:
    """A stack whose layers cannot be left out."""

    reason: str


Verdict: TypeAlias = NotAStack | Removable | Frozen


def layer_axes(propagation: Propagation, lists: Mapping[str, Sequence[str]]) -> list[Axis]:
    """An axis for each module list that is a stack of layers; frozen when more than the stream passes between them.

    lists: path of each module list -> the types of its elements. In a list of which every element is of another type
    (the sub-layers of a block) the code picks elements by position, so the list is no stack.
    """
    verdicts: dict[str, Verdict] = {}
    for path, types in lists.items():
        if len(types) > 1 and len(set(types)) < len(types):
            verdict = _LayerList(propagation, path, len(types)).judge()
            if not isinstance(verdict, NotAStack):
                verdicts[path] = verdict
    axes = []
    for name, (path, verdict) in zip(_names(list(verdicts)), verdicts.items(), strict=True):
        reason = verdict.reason if isinstance(verdict, Frozen) else None
        axes.append(Axis(name, len(lists[path]), "layer", reason, path=path))
    return axes


def _names(paths: list[str]) -> list[str]:
    if len(paths) == 1:
        return ["layers"]
    numbered = [[f"L{word}" if word.isdigit() else word for word in words] for words in distinguish(paths)]
    return [".".join([*words, "layers"]) for words in numbered]


class _LayerList:
    """What passes between the elements of one module list.

    makers: key of a value -> index of the element that made it first, None for code outside the list.
    users: key of a value -> the elements that read it, None for code outside the list.
    entering: for each element, the keys of values that it reads and did not make.
    leaving: for each element, the keys of values that it made and others read.
    """

    def __init__(self, propagation: Propagation, path: str, count: int) -> None:
        self.values, self.count = propagation.values, count
        self.makers: dict[int, int | None] = {}
        self.users: dict[int, set[int | None]] = {}
        self.entering: list[set[int]] = [set() for _ in range(count)]
        for visit in propagation.trail:
            element = _element(visit.module, path)
            for key in visit.taken:
                self.users.setdefault(key, set()).add(element)
                if element is not None and self.makers.get(key) != element:
                    self.entering[element].add(key)
            for key in visit.made:
                self.makers.setdefault(key, element)
        for value in propagation.outputs:
            self.users.setdefault(value.key, set()).add(None)
        self.leaving: list[set[int]] = [set() for _ in range(count)]
        for key, element in self.makers.items():
            if element is not None and self.users.get(key, set()) - {element}:
                self.leaving[element].add(key)

    def judge(self) -> Verdict:
        """Whether the list is a stack of layers, and whether its layers can be left out."""
        stream = self._stream()
        if not stream:
            return NotAStack()
        for element, key in enumerate(stream):
            if self.leaving[element] - {key}:
                return Frozen(f"layer {element} hands on more than the residual stream")
            if element + 1 < self.count and self.users[key] - {element, element + 1}:
                return Frozen(f"the output of layer {element} is used outside the next layer")
        return Removable()

    def _stream(self) -> list[int]:
        """The key of the stream after each element; empty when no stream goes in, through all of them and out."""
        stream: list[int] = []
        for element, leaving in enumerate(self.leaving):
            passed = leaving & self.entering[element + 1] if element + 1 < self.count else leaving
            passed = {key for key in passed if not stream or self._alike(key, stream[-1])}
            if not passed:
                return []
            stream.append(max(passed))
        enters = any(self.makers.get(key) is None and self._alike(key, stream[0]) for key in self.entering[0])
        return stream if enters and self._is_activation(stream[0]) else []

    def _alike(self, a: int, b: int) -> bool:
        """The same hidden axis at as many positions, which may have been regrouped (windows) or moved."""
        x, y = self.values.get(a), self.values.get(b)
        if x is None or y is None or x.dtype != y.dtype or not (x.dims and y.dims):
            return False
        return same_axes(x.dims[-1], y.dims[-1]) and _positions(x) == _positions(y)

    def _is_activation(self, key: int) -> bool:
        value = self.values.get(key)
        return value is not None and value.dtype == "float" and value.rank >= 2


def _positions(value: Value) -> int:
    return prod(size(dim) for dim in value.dims)


def _element(module: str, path: str) -> int | None:
    """The index of the element of the module list `path` that a module is or stands in."""
    if not module.startswith(path + "."):
        return None
    index = module[len(path) + 1 :].split(".", 1)[0]
    return int(index) if index.isdigit() else None
