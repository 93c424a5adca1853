"""A model whose matrices are those that a GGUF file of some format gives back, with activations as they were: what
fewer bits cost a language model, measured in PyTorch.

The rounding is llama.cpp's own, and each matrix gets the type that it has in a file. A model that GGUF cannot hold has
its matrices rounded all the same, along their last dimension.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from secateur.deploy.gguf import quantise
from secateur.deploy.gguf.decoder import Decoder, decoder_of, written_name
from secateur.deploy.gguf.write import shapes_of, sizes_of
from secateur.deploy.target import DeployError

ROWS = 4096
"""Rows of a matrix that are rounded at a time."""
EXACT = "F32"


@dataclass(frozen=True)
class Kind:
    """How a parameter is stored. type: of its numbers. row: numbers of a row in the file, zeros that fill it up
    included."""

    type: str
    row: int


@torch.no_grad()
def round_weights(model: nn.Module, name: str) -> int:
    """Replace the matrices of a model, in place, by what a file of a format gives back.

    name: of the format, as `export` takes them. Returns the bytes that all weights take in such a file, without its
    header and tokenizer.

    Raises DeployError for a format that does not exist, or where the extra gguf is not installed.
    """
    import gguf  # optional: the extra gguf

    kinds, size = stored(model, quantise.find(name))
    for key, parameter in model.named_parameters():
        kind = kinds.get(key)
        if kind is None or kind.type == EXACT or not parameter.numel():
            continue
        for part in parameter.view(-1, parameter.shape[-1]).split(ROWS):
            padded = np.zeros((part.shape[0], kind.row), np.float32)
            padded[:, : part.shape[1]] = part.float().cpu().numpy()
            number = gguf.GGMLQuantizationType[kind.type]
            back = gguf.quants.dequantize(quantise.quantised(padded, kind.type), number).reshape(padded.shape)
            part.copy_(torch.from_numpy(np.ascontiguousarray(back[:, : part.shape[1]])))
    return size


def stored(model: nn.Module, form: quantise.Format) -> tuple[dict[str, Kind], int]:
    """How each parameter is stored in a format, and the bytes of all of them."""
    try:
        return _in_a_file(decoder_of(model), form)
    except DeployError:
        return _by_shape(model, form)


def _in_a_file(decoder: Decoder, form: quantise.Format) -> tuple[dict[str, Kind], int]:
    shapes = shapes_of(decoder, sizes_of(decoder, form))
    types = quantise.types(form, shapes)
    names = {parameter: written_name(parameter) for parameter in decoder.parameters}
    kinds = {
        parameter: Kind(types[name], shapes[name][-1]) for parameter, name in names.items() if name in shapes
    }  # a layer that attends no more is not in the file
    return kinds, _bytes(shapes, types)


def _by_shape(model: nn.Module, form: quantise.Format) -> tuple[dict[str, Kind], int]:
    """How a model that GGUF cannot hold is stored: matrices in the usual type, the output layer in its own."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    last = None if head is None else getattr(head, "weight", None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    types = {}
    for name, parameter in model.named_parameters():
        wanted = form.output if parameter is last else form.usual
        types[name] = quantise.fitting(wanted, parameter.shape[-1]) if parameter.ndim > 1 else EXACT
    return {name: Kind(kind, shapes[name][-1]) for name, kind in types.items() if shapes[name]}, _bytes(shapes, types)


def _bytes(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> int:
    return round(sum(math.prod(shape) * quantise.BITS[types[name]] / 8 for name, shape in shapes.items()))
