"""OpenVINO IR, run on the CPU in float32: any batch and length, generation with a cache, int8 weights by NNCF."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.deploy.target import DeployError, ExportUnit, Target, Written
from secateur.deploy.targets import transformers_exporter


def write(graphs: Mapping[str, ExportUnit], folder: Path, *, int8: bool = False) -> dict[str, Written]:
    """Write each graph by transformers' exporter, caches as plain inputs and outputs; `int8` compresses weights."""
    from torch.export import Dim
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFWeightCompressionConfig, OpenVINOConfig
    from transformers.exporters import OpenVINOExporter as Exporter

    if int8 and importlib.util.find_spec("nncf") is None:
        raise DeployError("nncf is not installed, which compresses weights for OpenVINO; `pip install nncf`")
    quantizer = NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig()) if int8 else None

    def settings(shapes: Any) -> OpenVINOConfig:
        return OpenVINOConfig(dynamic=True, dynamic_shapes=shapes, stateful=False, quantizer=quantizer)

    return transformers_exporter.write(Exporter(), settings, graphs, folder, lambda port, i: Dim.AUTO)


TARGET = Target("openvino", ("openvino",), "any", write, generates=True, int8="int8 weights by NNCF")
