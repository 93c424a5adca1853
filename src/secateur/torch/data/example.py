"""Example inputs for a Hugging Face model, made from its config, so that it can be traced without data."""

from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError

BATCH, LENGTH, TARGET_LENGTH = 2, 13, 7
"""Sizes of an example, chosen so that an axis hardly ever has one of them."""


def example_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model; ModelError when its config does not say what they are."""
    config = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if config is None or name is None:
        raise ModelError(f"a {type(model).__name__} needs an example batch: secateur.open(model, example=batch)")
    inputs = _main_input(name, config)
    if inputs is None:
        raise ModelError(f"no example can be made up for the input {name!r}; pass example=batch")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(config, TARGET_LENGTH)
    return {key: value.to(device) for key, value in inputs.items()}


def _main_input(name: str, config: Any) -> dict[str, torch.Tensor] | None:
    """The main input of a model and what belongs to it; None for an input that is not known here."""
    if name == "input_ids":
        ids = _ids(config, LENGTH)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None)
        if size is None:
            return None
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.rand(BATCH, getattr(vision, "num_channels", 3), height, width)}
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        return {"input_features": torch.rand(BATCH, bins, 2 * getattr(config, "max_source_positions", 1500))}
    if name == "input_values":
        return _sounds(config)
    return None


def _sounds(config: Any) -> dict[str, torch.Tensor] | None:
    """Sounds as samples, as many as give `LENGTH` frames; or as frames of a spectrogram; None where neither is so."""
    kernels, strides = (getattr(config, name, None) for name in ("conv_kernel", "conv_stride"))
    if kernels and strides:
        samples = LENGTH
        for kernel, stride in reversed(list(zip(kernels, strides, strict=True))):
            samples = (samples - 1) * stride + kernel
        return {"input_values": torch.randn(BATCH, samples)}
    frames, bins = (getattr(config, name, None) for name in ("max_length", "num_mel_bins"))
    return {"input_values": torch.randn(BATCH, frames, bins)} if frames and bins else None


def _ids(config: Any, length: int) -> torch.Tensor:
    """Random token ids (BATCH, length), always the same."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 2
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (BATCH, length), generator=generator)
