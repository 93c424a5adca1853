"""The inputs of a model, found from its signature, dummy inputs and config, from the tokenizer, image processor or
feature extractor that lies beside it, and from data; never from its name.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.deploy import runner
from secateur.deploy.target import DeployError, Port, Target
from secateur.torch.base.batches import by_name, without_labels
from secateur.torch.data.example import BATCH, LENGTH, TARGET_LENGTH, example_for
from secateur.torch.data.text_rows import input_embeddings, text_positions
from secateur.torch.shrink.vocabulary import TABLE

SYMBOLS = {"batch": BATCH, "length": LENGTH, "target": TARGET_LENGTH}
"""Symbolic dimensions and the sizes that they have in an example."""
TRAVELS = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja"]
TRAVELS += ["preprocessor_config.json", "processor_config.json", "generation_config.json", TABLE]
"""Files that go with an artefact: tokenizers and image processors, and their settings."""
DEFAULT_BOUNDS = {"batch": 8, "length": 128}
"""Largest batch and length for targets that need bounds, where the user names none."""


def inputs_of(model: nn.Module, processor: Any = None, source: Path | None = None) -> dict[str, torch.Tensor]:
    """Example inputs of the model: its own, those of the tokenizer that it takes, images of the processor's size, and
    a second of sound at the rate of the feature extractor.

    Raises ModelError where the model's config does not say what they are.
    """
    example = example_for(model)
    takes = inspect.signature(model.forward).parameters
    for name in getattr(processor, "model_input_names", ()):
        if name in takes and name not in example and "input_ids" in example:
            example[name] = torch.zeros_like(example["input_ids"])
    settings = processor_settings(source) if source is not None else {}
    size = image_size(settings)
    if size is not None and "pixel_values" in example:
        batch, channels = example["pixel_values"].shape[:2]
        example["pixel_values"] = torch.rand(batch, channels, *size)
    sounds, rate = example.get("input_values"), settings.get("sampling_rate")
    if sounds is not None and sounds.dim() == 2 and isinstance(rate, int):
        example["input_values"] = sounds = torch.randn(len(sounds), max(rate, sounds.shape[1]))
        if settings.get("return_attention_mask") and "attention_mask" in takes:
            example["attention_mask"] = torch.ones(sounds.shape, dtype=torch.long)
    return example


def processor_settings(folder: Path) -> dict[str, Any]:
    """The settings of the image processor or feature extractor in a folder; empty where it has none."""
    try:
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def image_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in pixels of what an image processor gives, by its settings, or None."""
    for key in ("crop_size", "size"):
        value = settings.get(key)
        if isinstance(value, dict) and "height" in value:
            return int(value["height"]), int(value["width"])
        if isinstance(value, int):
            return value, value
    return None


def from_data(model: nn.Module, made_up: Mapping[str, torch.Tensor] | None, first: Any) -> dict[str, torch.Tensor]:
    """Example inputs with the names and the floating-point sizes of the first batch of data.

    made_up: what `inputs_of` gives, which knows best how tokens and masks are made up; None where it knows nothing.
    """
    known = made_up or {}
    given = {
        name: known[name] if name in known and _is_whole(value) else value
        for name, value in without_labels(by_name(model, first)).items()
    }
    return {**given, **{name: value for name, value in known.items() if name.startswith("decoder_")}}


def ports_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[Port]:
    """The ports for example inputs: whole numbers in two dimensions are tokens, and sounds have any number of samples;
    everything else varies by batch.
    """
    main, vocabulary = getattr(model, "main_input_name", None), _vocabulary(model)
    samples = _samples(inputs, main)
    ports = []
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise DeployError(f"the example's {name} is a {type(value).__name__}, not a tensor; pass tensors only")
        if not value.dim():
            raise DeployError(f"the example's {name} is a single number; the first dimension must be the batch")
        shape: list[int | str] = ["batch", *map(int, value.shape[1:])]
        of_decoder = name.startswith("decoder_") and name != main
        is_sound = samples > 0 and not of_decoder and value.dim() > 1 and value.shape[1] == samples
        if is_sound:
            shape[1] = "samples"
        elif value.dim() == 2 and _is_whole(value):
            shape[1] = "target" if of_decoder else "length"
        dtype = str(value.dtype).removeprefix("torch.")
        is_token = name == main or name.endswith("input_ids")
        high = vocabulary if is_token or not _is_whole(value) else int(value.max()) + 1
        fill = _fill(name, value, is_token=is_token)
        ports.append(Port(name, dtype, tuple(shape), fill, high=high, usual=samples if is_sound else 0))
    return ports


def _samples(inputs: Mapping[str, torch.Tensor], main: str | None) -> int:
    """How many samples, or frames with a mask, the sounds among example inputs have; 0 where there are none."""
    value = inputs.get(main) if main is not None else None
    if not isinstance(value, torch.Tensor) or _is_whole(value) or value.dim() < 2:
        return 0
    mask = inputs.get("attention_mask")
    is_masked = isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] == value.shape[1]
    return int(value.shape[1]) if is_masked or (main == "input_values" and value.dim() == 2) else 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _fill(name: str, value: torch.Tensor, *, is_token: bool) -> str | float:
    """How to make up inputs like an example: a constant for one number throughout, and for masks and numbers of parts,
    which hold 0 and 1.
    """
    if value.is_floating_point():
        return "normal"
    first = value.flatten()[0]
    if bool((value == first).all()):
        return first.item()
    if not is_token and int(value.min()) >= 0 and int(value.max()) <= 1:
        return 1 if name.endswith("mask") else 0
    return "ids"


def _vocabulary(model: nn.Module) -> int:
    weight = getattr(input_embeddings(model), "weight", None)
    return int(weight.shape[0]) if weight is not None and weight.dim() == 2 else 2


def fitted(target: Target, model: nn.Module, ports: list[Port], batch: int | None, length: int | None) -> list[Port]:
    """The ports as the target can hold them; DeployError for shapes that it, or the model, cannot have."""
    if target.shapes == "any":
        if batch is not None or length is not None:
            raise DeployError(f"{target.name} takes any batch and length; leave out batch and length")
        return ports
    positions = positions_of(model)
    most = longest(model, length)
    usual = max((port.usual for port in ports), default=0)
    sizes = {"batch": DEFAULT_BOUNDS["batch"] if batch is None else int(batch), "length": most, "target": most}
    sizes["samples"] = usual if length is None else int(length)
    for name, size in sizes.items():
        if name != "samples" and (size < 1 or (name != "batch" and size < 2)):
            raise DeployError(f"{name} {size} is too small; {target.name} needs at least one row and two tokens")
    if any(symbol in port.shape for port in ports for symbol in ("length", "target")):
        if positions is not None and most > positions:
            raise DeployError(
                f"length {most} is more than the {positions} positions of the model; pass length {positions}"
            )
    elif length is not None and not usual:
        raise DeployError(f"{type(model).__name__} takes no tokens, so there is no length {length}; leave it out")
    limit = _fix if target.shapes == "fixed" else _bound
    return [limit(port, sizes) for port in ports]


def longest(model: nn.Module, length: int | None) -> int:
    """How many tokens a text may have: the length that the user names; else the usual one, if the model has as many."""
    if length is not None:
        return int(length)
    return min(DEFAULT_BOUNDS["length"], positions_of(model) or DEFAULT_BOUNDS["length"])


def _fix(port: Port, sizes: Mapping[str, int]) -> Port:
    """The port at one shape."""
    return replace(port, shape=tuple(sizes.get(n, n) if isinstance(n, str) else n for n in port.shape))


def _bound(port: Port, sizes: Mapping[str, int]) -> Port:
    """The port with its symbols bounded."""
    return replace(port, at_most={i: sizes[n] for i, n in enumerate(port.shape) if isinstance(n, str)})


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, where its config says so."""
    config = getattr(model, "config", None)
    limits = [text_positions(model), *(getattr(config, name, None) for name in ("max_target_positions", "n_positions"))]
    return min((int(n) for n in limits if isinstance(n, int) and n > 0), default=None)


def tensors(ports: list[Port], sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Made-up inputs of those sizes; a symbol whose bound is below its size takes the bound."""
    graph = {"inputs": [as_json(port) for port in ports]}
    bounded = {str(port.shape[i]): most for port in ports for i, most in port.at_most.items()}
    bounds = {symbol: min(sizes.get(symbol, most), most) for symbol, most in bounded.items()}
    return {k: torch.from_numpy(v) for k, v in runner.made_up(graph, {**sizes, **bounds}, seed).items()}


def as_json(port: Port) -> dict[str, Any]:
    """A port as `artefact.json` holds it."""
    return {**asdict(port), "shape": list(port.shape), "at_most": {str(k): v for k, v in port.at_most.items()}}


def named_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a model gives, by name, caches left out."""
    from transformers.exporters.utils import get_leaf_tensors

    takes = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in takes else {}
    return get_leaf_tensors(model(**inputs, **extra))


def shapes_of(feed: Mapping[str, Any]) -> str:
    """Shapes of a batch in words, e.g. "8 x 64"."""
    first = next(iter(feed.values()))
    return " x ".join(str(n) for n in np.shape(first))
