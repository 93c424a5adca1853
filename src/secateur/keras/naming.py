"""Names of layers and parameters: layer names joined by dots, the same before and after a model is rebuilt.

A rebuilt model is flat, and no backend takes dots in the names of layers: there a path is written with `__`.
"""

from collections.abc import Iterator
from typing import Any

import keras

DOT = "__"
"""Replaces the dot of a path in the name of a layer."""


def layers(model: keras.Layer, prefix: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Every layer below `model` with its path, outer layers first; a layer that occurs twice comes once."""
    yield from _below(model, prefix, {id(model)})


def _below(layer: keras.Layer, prefix: str, seen: set[int]) -> Iterator[tuple[str, keras.Layer]]:
    taken: set[str] = set()
    for child in layer._flatten_layers(include_self=False, recursive=False):
        if id(child) in seen:
            continue
        seen.add(id(child))
        own = child.name.replace(DOT, ".")
        name, number = own, 2
        while name in taken:
            name, number = f"{own}_{number}", number + 1
        taken.add(name)
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        yield from _below(child, path, seen)


def own_variables(layer: keras.Layer) -> list[Any]:
    """The variables a layer holds itself, states of random generators and metrics left out."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def variables(model: keras.Layer) -> dict[str, Any]:
    """Every weight of the model by name (`block_0.attention.query.kernel`), a shared one once."""
    by_name: dict[str, Any] = {}
    seen: set[int] = set()
    for path, layer in [("", model), *layers(model)]:
        for variable in own_variables(layer):
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            name, number = variable.name, 2
            full = f"{path}.{name}" if path else name
            while full in by_name:
                full, number = f"{path}.{name}_{number}" if path else f"{name}_{number}", number + 1
            by_name[full] = variable
    return by_name
