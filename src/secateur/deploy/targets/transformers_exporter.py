"""Writes graphs by transformers' own exporters, for ONNX, OpenVINO and ExecuTorch.

The exporters change together with the models of transformers, so they are the first to know the caches and attention
patterns of new families. https://huggingface.co/docs/transformers/exporters
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.deploy.target import ExportUnit, Port, Written
from secateur.torch.trace.export import attribute, configs_of

Dimension = Callable[[Port, int], Any]


def write(
    exporter: Any, settings: Any, graphs: Mapping[str, ExportUnit], folder: Path, dimension: Dimension
) -> dict[str, Written]:
    """Export every graph and write them together, with the manifest that `ExportedModel.from_pretrained` reads.

    settings: `dynamic_shapes` -> the exporter's config.
    dimension: (port, position of a symbol) -> the dynamic dimension there, or None for a fixed one.
    """
    from transformers.exporters import ExportedModel

    components, outputs = {}, {}
    with contextlib.ExitStack() as stack:
        for graph in graphs.values():
            if "past_key_values" not in graph.inputs and "use_cache" not in graph.inputs:
                for config in configs_of(graph.module):
                    stack.enter_context(attribute(config, "use_cache", value=False))
        for name, graph in graphs.items():
            components[name], outputs[name] = export(exporter, settings, graph, dimension)
    model = next(iter(graphs.values())).module
    whole = ExportedModel(
        components,
        exporter.export_format,
        config=getattr(model, "config", None),
        generation_config=getattr(model, "generation_config", None),
    )
    whole.save_pretrained(folder)
    written = {}
    for name in graphs:
        first = f"{exporter.program_prefix}{name}{exporter.program_suffix}"
        files = exporter.program_files(first) if hasattr(exporter, "program_files") else [first]
        written[name] = Written([file for file in files if (folder / file).is_file()], outputs[name])
    return written


def export(exporter: Any, settings: Any, graph: ExportUnit, dimension: Dimension) -> tuple[Any, list[str]]:
    """One graph as a component of transformers' `ExportedModel`, and the names of its outputs."""
    from transformers.exporters.utils import get_leaf_tensors

    inputs = {k: copy.deepcopy(v) for k, v in graph.inputs.items()}
    takes = inspect.signature(graph.module.forward).parameters
    if "use_cache" in takes and "past_key_values" not in inputs and "use_cache" not in inputs:
        inputs["use_cache"] = False
    named = all(port.name in inputs for port in graph.ports)
    shapes = {p.name: dimensions(p, dimension) for p in graph.ports} if named else None
    with torch.no_grad():
        outputs = list(get_leaf_tensors(graph.module(**copy.deepcopy(inputs))))
    exported = exporter.export(graph.module, inputs, config=settings(shapes))
    component = next(iter(exported.components.values()))
    strip(component.program)
    return component, outputs


def strip(program: Any) -> None:
    """Leave out torch's notes on each ONNX node about its source code."""
    nodes = getattr(getattr(program, "graph", None), "all_nodes", None)
    for node in nodes() if nodes is not None else ():
        node.metadata_props.clear()


def dimensions(port: Port, dimension: Dimension) -> dict[int, Any]:
    """The dynamic dimensions of a port."""
    dynamic = {i: dimension(port, i) for i, n in enumerate(port.shape) if isinstance(n, str)}
    return {i: value for i, value in dynamic.items() if value is not None}
