"""ONNX, run by ONNX Runtime: any batch and length, generation with a key-value cache, dynamic int8."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.deploy.onnx_graph.int8 import quantise
from secateur.deploy.target import ExportUnit, Target, Written
from secateur.deploy.targets import transformers_exporter


def write(graphs: Mapping[str, ExportUnit], folder: Path, *, int8: bool = False) -> dict[str, Written]:
    """Write each graph by transformers' exporter, optimised; `int8` rounds weights, and activations when it runs."""
    from torch.export import Dim
    from transformers.exporters import OnnxConfig, OnnxExporter

    def settings(shapes: Any) -> OnnxConfig:
        return OnnxConfig(dynamic=True, dynamic_shapes=shapes)

    written = transformers_exporter.write(OnnxExporter(), settings, graphs, folder, lambda port, i: Dim.AUTO)
    if int8:
        for program in written.values():
            quantise(folder / program.files[0])
    return written


TARGET = Target(
    "onnx",
    ("onnx", "onnxscript", "onnxruntime"),
    "any",
    write,
    generates=True,
    int8="dynamic int8 of ONNX Runtime",
    sparse=True,
)
