"""Search a configuration whose numbers alone describe the sizes of a shrunk model, and prove it by building the model.

The proof is the model's class, built from the edited configuration on the meta device: each tensor must have the shape,
and each module the simple attributes, that it has in the model.
"""

import copy
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from secateur.torch.base import manifest
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

_KEYS = re.compile(r"head|kv|ffn|ff$|inner|interm|mlp|expert|vocab|hidden|d_model|dim|embd|layers?$|width|size$")
_NOT_SIZES = re.compile(r"patch|image|kernel|window|chunk|stride|position|token_id|per_tok|bucket|max_")
_ATTEMPTS = 400
_IGNORED = ("training", "name_or_path", "is_quantized", "config", "generation_config", "warnings_issued")

Shape = tuple[int, ...]
Difference = dict[str, tuple[Shape | None, Shape | None]]
"""Tensor -> (wanted shape, built shape), None where a model does not have it."""


def find_config(model: Any) -> tuple[Any | None, str]:
    """A configuration from which the model's own class builds exactly this model: (config, "") or (None, why not)."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    wanted = _shapes(model)
    try:
        built = _build(model, config)
    except EXPECTED as error:
        return None, f"{type(model).__name__} cannot be built from its configuration ({in_a_line(error)})"
    uneven = _uneven(wanted, _shapes(built))
    if uneven:
        return None, uneven
    search = _Search(model, wanted)
    while differing := _differing(wanted, _shapes(built)):
        best = search.best_edit(config, differing)
        if best is None:
            name, (want, have) = next(iter(differing.items()))
            return None, (
                f"{name} is {want} where the configuration gives {have}, and no number of {type(config).__name__} "
                f"changes that alone{search.refusal}"
            )
        config, built = best
    config, built = _with_scales(model, config, built)
    difference = _other_attribute(model, built)
    return (None, difference) if difference else (config, "")


class _Search:
    """Builds edited configurations, at most `_ATTEMPTS`, and keeps the last reason why numbers were refused.

    model: the shrunk model.
    wanted: the shapes of its tensors.
    """

    def __init__(self, model: Any, wanted: dict[str, Shape]) -> None:
        self.model, self.wanted = model, wanted
        self.attempts, self.refusal = 0, ""

    def best_edit(self, config: Any, differing: Difference) -> tuple[Any, nn.Module] | None:
        """The edit that leaves the fewest differences, and its model; None when no edit leaves fewer than there are."""
        best: tuple[Any, nn.Module] | None = None
        fewest = len(differing)
        for edited in _edits(config, differing):
            self.attempts += 1
            if self.attempts > _ATTEMPTS or not fewest:
                break
            try:
                candidate = _build(self.model, edited)
            except EXPECTED as error:  # an impossible combination of numbers is no candidate
                self.refusal = f"; other numbers are refused ({in_a_line(error)})"
                continue
            remaining = len(_differing(self.wanted, _shapes(candidate)))
            if remaining < fewest:
                best, fewest = (edited, candidate), remaining
        return best


def _with_scales(model: nn.Module, config: Any, built: nn.Module) -> tuple[Any, nn.Module]:
    """Set the numbers of the configuration that modules hold unchanged (epsilons) to the values in the model."""
    edited, twins = copy.deepcopy(config), dict(built.named_modules())
    wanted = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            old = vars(twins[path]).get(name) if path in twins else None
            if type(value) is float and type(old) is float and value != old:
                wanted[old] = value
    if not wanted:
        return config, built
    for part in _parts(edited).values():
        for key, value in list(vars(part).items()):
            if type(value) is float and value in wanted:
                setattr(part, key, wanted[value])
    return edited, _build(model, edited)


def validate(config: Any) -> None:
    """Raise what transformers raises when it saves or loads a configuration, or one inside it, that it refuses."""
    for part in _parts(config).values():
        if hasattr(part, "validate"):  # a manifest among them has no such rules
            part.validate()


def _build(model: Any, config: Any) -> nn.Module:
    """The model's class from a configuration on the meta device; raises where transformers refuses either."""
    validate(config)
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in manifest.named_tensors(model).items()}


def _differing(wanted: dict[str, Shape], have: dict[str, Shape]) -> Difference:
    return {n: (wanted.get(n), have.get(n)) for n in {**wanted, **have} if wanted.get(n) != have.get(n)}


def _uneven(wanted: dict[str, Shape], have: dict[str, Shape]) -> str:
    """Why numbers cannot describe sizes that differ between layers; empty when sizes do not differ."""
    seen: dict[tuple[str, Shape], tuple[str, Shape]] = {}
    for name, shape in wanted.items():
        if name not in have:
            continue
        first, first_shape = seen.setdefault((re.sub(r"\.\d+\.", ".*.", name), have[name]), (name, shape))
        if first_shape != shape:
            return f"sizes differ by layer: {first} is {first_shape} and {name} is {shape}"
    return ""


def _edits(config: Any, differing: Difference) -> Iterator[Any]:
    """Configurations with one number (or all numbers of heads) scaled by the ratio of a differing dimension."""
    numbers = list(_size_numbers(config))
    heads = [number for number in numbers if "head" in number.key and "dim" not in number.key]
    groups = [[number] for number in numbers] + ([heads] if len(heads) > 1 else [])
    for group, ratio in itertools.product(groups, sorted(_ratios(differing))):
        scaled = [number.value * ratio for number in group]
        if all(value.denominator == 1 and value > 0 for value in scaled):
            edited = copy.deepcopy(config)
            parts = _parts(edited)
            for number, value in zip(group, scaled, strict=True):
                setattr(parts[number.path], number.key, int(value))
            yield edited


def _ratios(differing: Difference) -> set[Fraction]:
    """Wanted extent over built extent of each dimension that differs."""
    pairs = [(w, h) for w, h in differing.values() if w is not None and h is not None and len(w) == len(h)]
    return {Fraction(a, b) for w, h in pairs for a, b in zip(w, h, strict=True) if a != b and b}


class _Number(NamedTuple):
    """A number of a configuration: path of the configuration inside the root configuration, key, value."""

    path: str
    key: str
    value: int


def _size_numbers(config: Any) -> Iterator[_Number]:
    """The numbers of a configuration, and of those inside it, whose keys may name a size."""
    for path, part in _parts(config).items():
        for key, value in vars(part).items():
            if type(value) is int and value > 1 and _KEYS.search(key) and not _NOT_SIZES.search(key):
                yield _Number(path, key, value)


def _parts(config: Any, path: str = "") -> dict[str, Any]:
    """A configuration and the configurations inside it, by their paths."""
    parts = {path: config}
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            parts |= _parts(value, f"{path}.{name}" if path else name)
    return parts


def _other_attribute(model: nn.Module, built: nn.Module) -> str:
    """The first simple attribute in which two models of equal shapes differ; empty when there is none."""
    twins = dict(built.named_modules())
    for path, module in model.named_modules():
        twin = twins.get(path)
        if type(twin) is not type(module):
            return f"{path} is a {type(module).__name__}, but the configuration builds {type(twin).__name__}"
        for name, value in vars(module).items():
            if name.startswith("_") or name in _IGNORED or not isinstance(value, int | float | str | tuple | None):
                continue
            if vars(twin).get(name) != value:
                return f"{path}.{name} is {value!r}, but the configuration gives {vars(twin).get(name)!r}"
    return ""
