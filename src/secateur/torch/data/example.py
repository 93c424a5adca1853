"""Example inputs for a Hugging Face model, made from its config, so that it can be traced without data."""

import inspect
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError

BATCH, LENGTH, TARGET_LENGTH = 2, 13, 7
"""Sizes of an example, chosen so that an axis hardly ever has one of them."""
FRAMES = 37
"""Frames of a sound that is read as samples, or as features of any length."""
IMAGE = 64
"""Height and width of an image for a model that takes any."""


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
    takes_decoder_ids = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and takes_decoder_ids:
        inputs["decoder_input_ids"] = _ids(config, TARGET_LENGTH)
    return {key: value.to(device) for key, value in inputs.items()}


def _main_input(name: str, config: Any) -> dict[str, torch.Tensor] | None:
    """The main input of a model and what belongs to it; None for an input that is not known here."""
    if name == "input_ids":
        ids = _ids(config, LENGTH)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or IMAGE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.rand(BATCH, getattr(vision, "num_channels", 3), height, width)}
    if name == "input_features":
        return {"input_features": _sound_features(config)}
    if name == "input_values":
        samples = _samples(config)
        return None if samples is None else {"input_values": samples}
    return None


def _sound_features(config: Any) -> torch.Tensor:
    """Features of sounds: (BATCH, frames, features) where the config names these, else (BATCH, mel bins, frames)."""
    size = getattr(config, "input_feat_per_channel", None) or getattr(config, "feature_projection_input_dim", None)
    if size is not None:
        return torch.rand(BATCH, 2 * FRAMES, size * getattr(config, "input_channels", 1))
    bins = getattr(config, "num_mel_bins", 80)
    return torch.rand(BATCH, bins, 2 * getattr(config, "max_source_positions", 1500))


def _samples(config: Any) -> torch.Tensor | None:
    """Sounds as samples (BATCH, samples) of which convolutions make `FRAMES` frames, or as spectrograms of the one
    length that the config names (BATCH, frames, mel bins); None where it names neither.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels and strides:
        length = FRAMES
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            length = (length - 1) * stride + kernel
        return torch.rand(BATCH, length) * 2 - 1
    if getattr(config, "max_length", None) and getattr(config, "num_mel_bins", None):
        return torch.rand(BATCH, config.max_length, config.num_mel_bins)
    return None


def _ids(config: Any, length: int) -> torch.Tensor:
    """Random token ids (BATCH, length), always the same."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 2
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (BATCH, length), generator=generator)
