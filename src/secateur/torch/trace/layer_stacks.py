"""Layer axes: module lists whose elements pass one residual stream along, so that leaving one out is a bypass."""

from collections.abc import Mapping, Sequence
from math import prod

from secateur.layout import Axis
from secateur.torch.trace.atoms import expand, size
from secateur.torch.trace.propagate import Propagation
from secateur.torch.trace.values import Value


def layer_axes(walk: Propagation, lists: Mapping[str, Sequence[str]]) -> list[Axis]:
    """An axis for each module list that is a chain of layers; frozen when more than the stream passes between them.

    lists: path of each module list -> the types of its elements. In a list of which every element is of another type
    (the sub-layers of a block) the code picks elements by position, so it is no chain.
    """
    chains = {}
    for path, types in lists.items():
        if len(types) > 1 and len(set(types)) < len(types):
            reason = _LayerStack(walk, path, len(types)).judge()
            if reason is not None:
                chains[path] = (len(types), reason or None)
    names = _names(list(chains))
    return [Axis(names[p], n, "layer", why, path=p) for p, (n, why) in chains.items()]


def _names(paths: list[str]) -> dict[str, str]:
    if len(paths) == 1:
        return {paths[0]: "layers"}
    split = [p.split(".") for p in paths]
    while all(len(p) > 1 for p in split) and len({p[0] for p in split}) == 1:
        split = [p[1:] for p in split]
    while all(len(p) > 1 for p in split) and len({p[-1] for p in split}) == 1:
        split = [p[:-1] for p in split]
    numbered = [[f"L{word}" if word.isdigit() else word for word in short] for short in split]
    return {path: ".".join([*short, "layers"]) for path, short in zip(paths, numbered, strict=True)}


class _LayerStack:
    """What passes between the elements of one module list."""

    def __init__(self, walk: Propagation, path: str, count: int) -> None:
        self.walk, self.count = walk, count
        self.maker: dict[int, int | None] = {}
        self.users: dict[int, set[int | None]] = {}
        self.entering: list[set[int]] = [set() for _ in range(count)]
        for step in walk.trail:
            at = _element(step.module, path)
            for key in step.taken:
                self.users.setdefault(key, set()).add(at)
                if at is not None and self.maker.get(key) != at:
                    self.entering[at].add(key)
            for key in step.made:
                self.maker.setdefault(key, at)
        for value in walk.outputs:
            self.users.setdefault(value.key, set()).add(None)

    def judge(self) -> str | None:
        """None: no chain. '': a chain. Otherwise why its layers cannot be left out."""
        made: list[set[int]] = [set() for _ in range(self.count)]
        for key, at in self.maker.items():
            if at is not None and self.users.get(key, set()) - {at}:
                made[at].add(key)
        stream: list[int] = []
        for at in range(self.count):
            passed = made[at] & self.entering[at + 1] if at + 1 < self.count else made[at]
            passed = {key for key in passed if not stream or self._alike(key, stream[-1])}
            if not passed:
                return None
            stream.append(max(passed))
        if not any(self.maker.get(k) is None and self._alike(k, stream[0]) for k in self.entering[0]):
            return None
        if not self._named(stream[0]):
            return None
        for at, key in enumerate(stream):
            if made[at] - {key}:
                return f"layer {at} hands on more than the residual stream"
            if at + 1 < self.count and self.users[key] - {at, at + 1}:
                return f"the output of layer {at} is used outside the next layer"
        return ""

    def _alike(self, a: int, b: int) -> bool:
        """The same hidden axis at as many positions, which may have been regrouped (windows) or moved."""
        x, y = self.walk.values.get(a), self.walk.values.get(b)
        if x is None or y is None or x.dtype != y.dtype or not (x.dims and y.dims):
            return False
        same = [f.atom for f in expand(x.dims[-1])] == [f.atom for f in expand(y.dims[-1])]
        return same and _positions(x) == _positions(y)

    def _named(self, key: int) -> bool:
        value = self.walk.values.get(key)
        return value is not None and value.dtype == "float" and value.rank >= 2


def _positions(value: Value) -> int:
    return prod(size(dim) for dim in value.dims)


def _element(module: str, path: str) -> int | None:
    if not module.startswith(path + "."):
        return None
    index = module[len(path) + 1 :].split(".", 1)[0]
    return int(index) if index.isdigit() else None
