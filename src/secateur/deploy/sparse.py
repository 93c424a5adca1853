"""Rewrites an ONNX program so that its sparse linear layers run on secateur's kernels: MatMul and Gemm with a constant
weight become `secateur::SparseLinear` (see native/onnx/library.cpp), with the bias and the activation that follow.

Weights and patterns are found in the graph itself, so a program of any exporter will do.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur.deploy.target import DeployError, Written

OPERATORS = "secateur_onnx"
"""What an artefact's graph says when it needs the library that `secateur.runtime.onnx_library` finds."""
DOMAIN, OPERATOR = "secateur", "SparseLinear"
ALIGN = 4096
"""Of tensors in the file beside a program, so that they can be mapped into memory where they lie."""
EMBED = 1024
"""Bytes up to which a tensor stays in the program itself."""


def rewrite(
    written: Mapping[str, Written], folder: Path, *, tokens: int, value: str, measure: bool = True
) -> dict[str, Any]:
    """Rewrite every graph in a folder in place; returns how many linear layers there are, and how many were packed.

    tokens, value, measure: as for `secateur.runtime.compile`.

    Raises DeployError when there are no compiled kernels, or no layer that they make faster.
    """
    import onnx

    from secateur.runtime.native import load_native, onnx_library

    if load_native() is None:
        raise DeployError("sparse programs are packed by the compiled kernels; install a C++17 compiler and reinstall")
    onnx_library()
    layers = packed = 0
    for graph in written.values():
        path = folder / graph.files[0]
        model = onnx.load(path)
        found = Rewriter(model).run(tokens, value, measure)
        layers, packed = layers + found[0], packed + found[1]
        save(model, path)
    if not packed:
        raise DeployError(
            f"none of the {layers} linear layers is sparse enough to be faster on the kernels at {tokens} tokens; "
            "prune more, or export without sparse"
        )
    return {"tokens": tokens, "value": value, "layers": layers, "packed": packed}


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


class Rewriter:
    """One model's graph with its edges at hand."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.kept = {port.name for port in model.graph.output}

    def run(self, tokens: int, value: str, measure: bool) -> tuple[int, int]:
        """Replace what is worth it; returns the numbers of linear layers and of packed ones."""
        import onnx

        layers, packed = 0, {}
        for node in self.model.graph.node:
            weight = self.weight(node)
            if weight is None:
                continue
            layers += 1
            blob = pack_worthy(weight, tokens, value, measure)
            if blob is not None:
                packed[id(node)] = blob
        gone: set[int] = set()
        nodes = []
        for node in self.model.graph.node:
            if id(node) in packed:
                replacement, taken = self.replace(node, packed[id(node)])
                nodes.append(replacement)
                gone |= taken
            elif id(node) not in gone:
                nodes.append(node)
        if packed:
            graph = self.model.graph
            del graph.node[:]
            graph.node.extend(nodes)
            used = {name for node in nodes for name in node.input} | self.kept
            made = {name for node in nodes for name in node.output}
            constants = [tensor for tensor in self.constants.values() if tensor.name in used]
            ports = {port.name for port in graph.input}
            infos = [i for i in graph.value_info if i.name in made or i.name in used & ports]
            for field, values in ((graph.initializer, constants), (graph.value_info, infos)):
                del field[:]
                field.extend(values)
            self.model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
        return layers, len(packed)

    def weight(self, node: Any) -> np.ndarray | None:
        """The weight (out, in) of a linear layer that no other node reads, or None."""
        import onnx

        if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
            return None
        tensor = self.constants.get(node.input[1])
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
            return None
        if len(self.readers[tensor.name]) != 1 or node.input[0] in self.constants:
            return None
        transposed = False
        if node.op_type == "Gemm":
            has = {a.name: a.f if a.name in ("alpha", "beta") else a.i for a in node.attribute}
            if has.get("alpha", 1.0) != 1.0 or has.get("beta", 1.0) != 1.0 or has.get("transA", 0):
                return None
            transposed = bool(has.get("transB", 0))
            rows = tensor.dims[0] if transposed else tensor.dims[1]
            if len(node.input) > 2 and node.input[2] and not self.is_bias(node.input[2], rows):
                return None
        weight = onnx.numpy_helper.to_array(tensor)
        return np.ascontiguousarray(weight if transposed else weight.T)

    def is_bias(self, name: str, rows: int) -> bool:
        """Whether a value is a constant of so many float32 numbers in one dimension."""
        import onnx

        tensor = self.constants.get(name)
        return tensor is not None and list(tensor.dims) == [rows] and tensor.data_type == onnx.TensorProto.FLOAT

    def only_reader(self, name: str) -> Any:
        """The one node that reads a value which nobody else sees, or None."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.kept else None

    def replace(self, node: Any, blob: np.ndarray) -> tuple[Any, set[int]]:
        """The node that stands for a linear layer, and which nodes (besides it) it takes in."""
        import onnx

        from secateur.runtime.packed import ACTIVATIONS, describe

        rows = describe(blob).rows
        taken: set[int] = set()
        out, bias = node.output[0], ""
        if node.op_type == "Gemm" and len(node.input) > 2:
            bias = node.input[2]
        after = self.only_reader(out)
        if not bias and after is not None and after.op_type == "Add" and len(set(after.input)) == 2:
            other = next(name for name in after.input if name != out)
            if self.is_bias(other, rows):
                bias, out = other, after.output[0]
                taken.add(id(after))
        activation, result, more = self.activation(out)
        packed = onnx.numpy_helper.from_array(blob, f"{node.input[1]}.packed")
        self.constants[packed.name] = packed
        inputs = [node.input[0], packed.name, *([bias] if bias else [])]
        made = onnx.helper.make_node(
            OPERATOR, inputs, [result], name=node.name, domain=DOMAIN, activation=ACTIVATIONS.index(activation)
        )
        return made, taken | more

    def activation(self, name: str) -> tuple[str, str, set[int]]:
        """The activation that alone reads a value: its name, its output, and the nodes that it consists of."""
        after = self.only_reader(name)
        if after is not None and after.op_type == "Relu":
            return "relu", after.output[0], {id(after)}
        if after is not None and after.op_type == "Gelu":
            tanh = any(a.name == "approximate" and a.s == b"tanh" for a in after.attribute)
            return "gelu_tanh" if tanh else "gelu", after.output[0], {id(after)}
        # x * sigmoid(x)
        readers = self.readers[name]
        if name not in self.kept and sorted(n.op_type for n in readers) == ["Mul", "Sigmoid"]:
            gate, product = sorted(readers, key=lambda n: n.op_type == "Mul")
            if sorted(product.input) == sorted([name, gate.output[0]]) and self.only_reader(gate.output[0]) is not None:
                return "silu", product.output[0], {id(gate), id(product)}
        return "none", name, set()


def pack_worthy(weight: np.ndarray, tokens: int, value: str, measure: bool) -> np.ndarray | None:
    """A weight (out, in) packed, or None where it has few zeros or measured no faster."""
    from secateur.runtime.choose import choose, unmeasured
    from secateur.runtime.packed import pack
    from secateur.runtime.swap import MIN_ZEROS

    if np.count_nonzero(weight) > (1 - MIN_ZEROS) * weight.size:
        return None
    if value == "int8" and not np.isfinite(weight).all():
        return None
    choice = choose(weight, None, tokens, value) if measure else unmeasured(weight, tokens, value)
    return pack(weight, **choice.packing) if choice.packing is not None else None
