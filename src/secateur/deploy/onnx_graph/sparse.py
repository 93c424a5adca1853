"""Rewrites an ONNX program so that its sparse linear layers run on secateur's kernels.

MatMul and Gemm with a constant weight become `secateur::SparseLinear` (native/onnx/operators.h), with the bias, the
activation, the residual and the LayerNorm that follow; the attention between them becomes `secateur::Attention`.
Weights and patterns are found in the graph itself, so the program may come from any exporter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.deploy.onnx_graph.attention import fuse_attention
from secateur.deploy.onnx_graph.chains import fuse_chains
from secateur.deploy.onnx_graph.graph import OnnxGraph, attributes, is_plain, is_standard, other
from secateur.deploy.onnx_graph.norms_and_rotary import fuse_norms, fuse_rotary
from secateur.deploy.target import DeployError, Written
from secateur.kernels.format import ACTIVATIONS, LAYER_NORM, describe
from secateur.kernels.native import load_native, onnx_library
from secateur.kernels.packing import pack
from secateur.runtime.compile_model import MIN_ZEROS
from secateur.runtime.layers.tuning import choose, unmeasured, with_row_blocks

SHARED_BY = 4
"""Threads among which an exported layer can be shared out: their number is not known when the layer is packed."""
ALIGN = 4096
"""Alignment in bytes of tensors in the file beside a program, so that they can be mapped into memory where they lie."""
EMBED = 1024
"""Largest size in bytes of a tensor that stays in the program itself."""


def rewrite(
    written: Mapping[str, Written],
    folder: Path,
    *,
    tokens: int,
    value: str,
    activations: str = "float32",
    measure: bool = True,
) -> dict[str, Any]:
    """Rewrite every graph in a folder in place; returns how many linear layers there are, and how many were packed.

    tokens, value, activations, measure: as for `secateur.runtime.compile`.

    Raises DeployError when there are no compiled kernels, or no layer that they make faster.
    """
    import onnx

    if load_native() is None:
        raise DeployError("sparse programs are packed by the compiled kernels; install a C++17 compiler and reinstall")
    onnx_library()  # raises where secateur was installed without the library
    layers = packed = attentions = chains = norms = rotary = 0
    for program in written.values():
        path = folder / program.files[0]
        graph = OnnxGraph(onnx.load(path))
        nodes = linears(graph)
        layers += len(nodes)
        for node, weight in nodes:
            blob = pack_worthy(weight, tokens=tokens, value=value, activations=activations, measure=measure)
            if blob is not None:
                fuse_linear(graph, node, blob)
                packed += 1
        norms += fuse_norms(graph)
        rotary += fuse_rotary(graph)
        attentions += fuse_attention(graph)
        chains += fuse_chains(graph)
        graph.finish()
        save(graph.model, path)
    if not packed:
        raise DeployError(
            f"none of the {layers} linear layers is sparse enough to be faster on the kernels at {tokens} tokens; "
            "prune more, or export without sparse"
        )
    rounding = {"activations": activations} if activations != "float32" else {}
    return {
        "tokens": tokens,
        "value": value,
        **rounding,
        "layers": layers,
        "packed": packed,
        "norms": norms,
        "rotary": rotary,
        "attentions": attentions,
        "chains": chains,
    }


def save(model: Any, path: Path) -> None:
    """Write a program, and its larger tensors aligned into one file beside it."""
    import onnx
    from onnx.external_data_helper import set_external_data

    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            raw = tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()
            if tensor.data_type == onnx.TensorProto.STRING or len(raw) <= EMBED:
                continue
            file.write(b"\0" * (-file.tell() % ALIGN))
            tensor.raw_data = raw  # set_external_data takes no other form
            set_external_data(tensor, data.name, file.tell(), len(raw))
            file.write(raw)
            tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


def pack_worthy(weight: np.ndarray, *, tokens: int, value: str, activations: str, measure: bool) -> np.ndarray | None:
    """A packed weight (out, in), or None where the weight has few zeros or measured no faster."""
    if np.count_nonzero(weight) > (1 - MIN_ZEROS) * weight.size:
        return None
    if value == "int8" and not np.isfinite(weight).all():
        return None
    if measure:
        choice = choose(weight, None, tokens=tokens, value=value, activations=activations)
    else:
        choice = unmeasured(weight, tokens=tokens, value=value, activations=activations)
    if choice.packing is None:
        return None
    return pack(weight, **with_row_blocks(choice.packing, weight.shape[0], tokens, threads=SHARED_BY))


def linears(graph: OnnxGraph) -> list[tuple[Any, np.ndarray]]:
    """The linear layers of a graph with their weights (out, in)."""
    weights = [(node, weight_of(graph, node)) for node in graph.nodes]
    return [(node, weight) for node, weight in weights if weight is not None]


def weight_of(graph: OnnxGraph, node: Any) -> np.ndarray | None:
    """The weight (out, in) of a linear layer that no other node reads, or None."""
    import onnx

    if not is_standard(node, "MatMul", "Gemm"):
        return None
    name = node.input[1]
    tensor = graph.constants.get(name)
    if tensor is None or len(tensor.dims) != 2 or not graph.floats(name, *tensor.dims):
        return None
    if len(graph.readers[name]) != 1 or name in graph.kept or node.input[0] in graph.constants:
        return None
    transposed = bool(attributes(node).get("transB", 0))
    if node.op_type == "Gemm" and not _is_linear(graph, node, rows=tensor.dims[0] if transposed else tensor.dims[1]):
        return None
    weight = onnx.numpy_helper.to_array(tensor)
    return np.ascontiguousarray(weight if transposed else weight.T)


def _is_linear(graph: OnnxGraph, gemm: Any, *, rows: int) -> bool:
    """Whether a Gemm computes x W + b without factors, where b is a constant of that many rows, or left out."""
    has = attributes(gemm)
    if has.get("alpha", 1.0) != 1.0 or has.get("beta", 1.0) != 1.0 or has.get("transA", 0):
        return False
    bias = gemm.input[2] if len(gemm.input) > 2 else ""
    return not bias or graph.floats(bias, rows)


def fuse_linear(graph: OnnxGraph, node: Any, blob: np.ndarray) -> None:
    """Put SparseLinear in the place of a linear layer and of the operators after it that the kernel computes too."""
    rows = describe(blob).rows
    taken, out, bias = [node], node.output[0], ""
    if node.op_type == "Gemm" and len(node.input) > 2:
        bias = node.input[2]
    add = graph.only_reader(out, "Add")
    if not bias and add is not None and graph.floats(other(add, out), rows):
        bias, out = other(add, out), add.output[0]
        taken.append(add)
    activation, out = fuse_activation(graph, out, taken)
    residual = scale = shift = gate = ""
    norm_attributes: dict[str, Any] = {}
    product = graph.only_reader(out, "Mul")
    # Of two layers that are multiplied, the one without an activation comes last.
    if product is not None and activation == "none" and same_shape(graph, out, other(product, out)):
        gate, out = other(product, out), product.output[0]
        taken.append(product)
    add = graph.only_reader(out, "Add")
    if add is not None and same_shape(graph, out, other(add, out)):
        residual, out = other(add, out), add.output[0]
        taken.append(add)
    norm = graph.only_reader(out, "LayerNormalization")
    if norm is not None and is_plain(graph, norm, rows):
        scale, shift, out = norm.input[1], norm.input[2] if len(norm.input) > 2 else "", norm.output[0]
        norm_attributes = {"norm": LAYER_NORM, "epsilon": attributes(norm).get("epsilon", 1e-5)}
        taken.append(norm)
    packed = graph.add_constant(blob, f"{node.input[1]}.packed")
    inputs = [node.input[0], packed, bias, residual, scale, shift, gate]
    graph.replace(taken, "SparseLinear", inputs, out, activation=ACTIVATIONS.index(activation), **norm_attributes)


def same_shape(graph: OnnxGraph, a: str, b: str) -> bool:
    """Whether two values surely have the same shape, and neither is a constant."""
    shape = graph.shape(a)
    return shape is not None and shape == graph.shape(b) and b not in graph.constants


def fuse_activation(graph: OnnxGraph, name: str, taken: list[Any]) -> tuple[str, str]:
    """The activation that alone reads a value, and its output; the nodes that it consists of are added to `taken`."""
    after = graph.only_reader(name, "Relu", "Gelu")
    if after is not None:
        taken.append(after)
        if after.op_type == "Relu":
            return "relu", after.output[0]
        return "gelu_tanh" if attributes(after).get("approximate") == b"tanh" else "gelu", after.output[0]
    readers = graph.readers[name]
    if name not in graph.kept and sorted(node.op_type for node in readers) == ["Mul", "Sigmoid"]:
        gate, product = sorted(readers, key=lambda node: node.op_type == "Mul")
        if (
            sorted(product.input) == sorted([name, gate.output[0]])
            and graph.only_reader(gate.output[0], "Mul") is not None
        ):
            taken += [gate, product]
            return "silu", product.output[0]
    return "none", name
