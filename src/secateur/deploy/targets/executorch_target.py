"""ExecuTorch with XNNPACK: shapes up to a bound that is fixed on export."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.deploy.target import ExportUnit, Port, Target, Written
from secateur.deploy.targets import transformers_exporter


def write(graphs: Mapping[str, ExportUnit], folder: Path, *, int8: bool = False) -> dict[str, Written]:
    """Write each graph by transformers' exporter for XNNPACK, on a copy of the model, which it changes."""
    from torch.export import Dim
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    dims: dict[str, Any] = {}

    def dimension(port: Port, i: int) -> Any:
        name, most = str(port.shape[i]), port.at_most[i]
        least = 1 if name == "batch" else 2
        if most <= least:
            return None
        return dims.setdefault(name, Dim(name, min=least, max=most))

    def settings(shapes: Any) -> ExecutorchConfig:
        return ExecutorchConfig(
            dynamic=True, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True, backend="xnnpack"
        )

    copies = {name: replace(graph, module=copy.deepcopy(graph.module)) for name, graph in graphs.items()}
    return transformers_exporter.write(ExecutorchExporter(), settings, copies, folder, dimension)


TARGET = Target("executorch", ("executorch",), "bounded", write)
