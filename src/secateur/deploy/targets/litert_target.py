"""LiteRT (TensorFlow Lite) with XNNPACK: one fixed shape, whole numbers as int32."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from secateur.deploy.target import ExportUnit, Target, Written
from secateur.deploy.targets.inputs import named_outputs


class Positional(nn.Module):
    """A model in the form that LiteRT's converter takes: inputs by position, outputs as a tuple."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The model's outputs in order, caches left out."""
        return tuple(named_outputs(self.model, dict(zip(self.names, values, strict=True))).values())


def write(graphs: Mapping[str, ExportUnit], folder: Path, *, int8: bool = False) -> dict[str, Written]:
    """Convert each graph at the shape of its inputs."""
    import litert_torch

    written = {}
    for name, graph in graphs.items():
        example = {k: v.int() if v.dtype == torch.int64 else v for k, v in graph.inputs.items()}
        with torch.no_grad():
            outputs = list(named_outputs(graph.module, example))
        converted = litert_torch.convert(Positional(graph.module, list(example)).eval(), tuple(example.values()))
        # Written from memory, because the converter's own `export` ends the process when the disk is full.
        (folder / f"{name}.tflite").write_bytes(converted.model_content())
        written[name] = Written([f"{name}.tflite"], outputs)
    return written


TARGET = Target("litert", ("litert_torch", "ai_edge_litert"), "fixed", write)
