"""Changes the class of a module, so that it computes in another way but keeps its attributes, children and hooks."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import nn


class Swapped:
    """Comes before the plain class of a module in the bases of its new class.

    A subclass has either its own `forward`, which calls that of the plain class through `super()`, or a method
    `through(plain_forward, args, kwargs)`. In the second case the new class keeps the name of the plain class and the
    signature of its forward, which transformers inspects.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind, plain = type(self).__bases__
        return _blank, (kind, plain), self.__dict__


def swap_class(module: Any, kind: Any) -> None:
    """Put `kind`, a subclass of `Swapped`, before the class of a module."""
    plain: Any = type(module)
    module.__class__ = _swapped(kind, plain)


@cache
def _swapped(kind: Any, plain: Any) -> Any:
    if "forward" in vars(kind):
        return type(f"{kind.__name__}{plain.__name__}", (kind, plain), {})

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.through(self, plain.forward, args, kwargs)

    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (kind, plain), {**names, "forward": forward})


def _blank(kind: Any, plain: Any) -> nn.Module:
    """An empty module for copy and pickle, which cannot find a class that was made here by its name."""
    return object.__new__(_swapped(kind, plain))
