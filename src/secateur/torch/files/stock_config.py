"""Whether configuration numbers alone say the sizes of a shrunk model: searched, then proven by building it.

The proof is the class itself, built from the edited configuration on the meta device: every tensor must have the
shape, and every module the simple attributes, of the model at hand.
"""

import copy
import itertools
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from secateur.torch.base import manifest
from secateur.torch.base.expected_errors import EXPECTED, in_a_line

_KEYS = re.compile(r"head|kv|ffn|ff$|inner|interm|mlp|expert|vocab|hidden|d_model|dim|embd|layers?$|width|size$")
_NOT_SIZES = re.compile(r"patch|image|kernel|window|chunk|stride|position|token_id|per_tok|bucket|max_")
_ATTEMPTS = 400
_IGNORED = ("training", "name_or_path", "is_quantized", "config", "generation_config", "warnings_issued")


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
    attempts, refusal = 0, ""
    while differing := _differing(wanted, _shapes(built)):
        best = None
        for edited in _edits(config, differing):
            attempts += 1
            if attempts > _ATTEMPTS:
                break
            try:
                candidate = _build(model, edited)
            except EXPECTED as error:  # an impossible combination of numbers is no candidate
                refusal = f"; other numbers are refused ({in_a_line(error)})"
                continue
            left = _differing(wanted, _shapes(candidate))
            if len(left) < len(differing) and (best is None or len(left) < len(best[2])):
                best = (edited, candidate, left)
                if not left:
                    break
        if best is None:
            name, (want, have) = next(iter(differing.items()))
            return None, (
                f"{name} is {want} where the configuration gives {have}, and no number of {type(config).__name__} "
                f"changes that alone{refusal}"
            )
        config, built = best[0], best[1]
    config, built = _with_scales(model, config, built)
    other = _other_attribute(model, built)
    return (None, other) if other else (config, "")


def _with_scales(model: nn.Module, config: Any, built: nn.Module) -> tuple[Any, nn.Module]:
    """Give numbers of the configuration that modules hold as they are (epsilons) the value that the model has."""
    edited, twins = copy.deepcopy(config), dict(built.named_modules())
    wanted = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            old = vars(twins[path]).get(name) if path in twins else None
            if type(value) is float and type(old) is float and value != old:
                wanted[old] = value
    if not wanted:
        return config, built
    for _, place in _places(edited):
        for key, value in list(vars(place).items()):
            if type(value) is float and value in wanted:
                setattr(place, key, wanted[value])
    return edited, _build(model, edited)


def _build(model: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in manifest.named_tensors(model).items()}


Difference = dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]


def _differing(wanted: dict[str, tuple[int, ...]], have: dict[str, tuple[int, ...]]) -> Difference:
    return {n: (wanted.get(n), have.get(n)) for n in {**wanted, **have} if wanted.get(n) != have.get(n)}


def _uneven(wanted: dict[str, tuple[int, ...]], have: dict[str, tuple[int, ...]]) -> str:
    """Why sizes that differ between layers cannot be said by numbers; empty when they do not differ."""
    seen: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
    for name, shape in wanted.items():
        if name not in have:
            continue
        first, other = seen.setdefault((re.sub(r"\.\d+\.", ".*.", name), have[name]), (name, shape))
        if other != shape:
            return f"sizes differ by layer: {first} is {other} and {name} is {shape}"
    return ""


def _edits(config: Any, differing: Difference) -> Iterator[Any]:
    """Configurations with one number (or all numbers of heads) scaled as some differing dimension is."""
    pairs = [(w, h) for w, h in differing.values() if w is not None and h is not None and len(w) == len(h)]
    ratios = {Fraction(a, b) for w, h in pairs for a, b in zip(w, h, strict=True) if a != b and b}
    numbers = [
        (path, key, value)
        for path, place in _places(config)
        for key, value in vars(place).items()
        if type(value) is int and value > 1 and _KEYS.search(key) and not _NOT_SIZES.search(key)
    ]
    heads = [n for n in numbers if "head" in n[1] and "dim" not in n[1]]
    groups = [[number] for number in numbers] + ([heads] if len(heads) > 1 else [])
    for group, ratio in itertools.product(groups, sorted(ratios)):
        scaled = [(path, key, value * ratio) for path, key, value in group]
        if all(new.denominator == 1 and new > 0 for _, _, new in scaled):
            edited = copy.deepcopy(config)
            places = dict(_places(edited))
            for path, key, new in scaled:
                setattr(places[path], key, int(new))
            yield edited


def _places(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_diff_dict"):
            yield from _places(value, f"{path}.{name}" if path else name)


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
