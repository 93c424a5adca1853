"""Exported programs whose inputs and outputs go by position, on numpy and their runtime alone: LiteRT, ONNX Runtime,
OpenVINO, SavedModel. What `secateur.keras.export` writes is run by them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[Sequence[Any]], list[np.ndarray]]
"""Inputs in order -> outputs in order."""


def litert(path: Path, threads: int) -> Call:
    """A `.tflite` file on LiteRT, or on the copy of it that TensorFlow brings."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tensorflow.lite.python.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        for detail, value in zip(inputs, values, strict=True):
            interpreter.set_tensor(detail["index"], np.asarray(value, dtype=detail["dtype"]))
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    return call


def onnx(path: Path, threads: int) -> Call:
    """An `.onnx` file on ONNX Runtime, CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    return lambda values: list(session.run(None, dict(zip(names, map(np.asarray, values), strict=True))))


def openvino(path: Path, threads: int) -> Call:
    """An `.xml` file on OpenVINO, CPU, in float32."""
    import openvino as runtime

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = runtime.Core().compile_model(path, "CPU", options)
    return lambda values: list(compiled([np.asarray(value) for value in values]).values())


def saved_model(path: Path, threads: int) -> Call:
    """A SavedModel folder (or the file in it) that Keras exported, on TensorFlow."""
    import tensorflow as tf

    model = tf.saved_model.load(str(path.parent if path.suffix else path))
    inputs = model.serve.concrete_functions[0].structured_input_signature[0]

    def call(values: Sequence[Any]) -> list[np.ndarray]:
        given = tf.nest.pack_sequence_as(inputs, [tf.convert_to_tensor(value) for value in values])
        return [np.asarray(x) for x in tf.nest.flatten(model.serve(*given))]

    return call


OPENERS = {".tflite": litert, ".onnx": onnx, ".xml": openvino, ".pb": saved_model, "": saved_model}


def open(path: Path | str, threads: int = 1) -> Call:
    """A program by the ending of its file; a folder is a SavedModel."""
    return OPENERS[Path(path).suffix](Path(path), threads)


def load(folder: Path, graph: Mapping[str, Any], threads: int) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """The program of an artefact (see `secateur.deploy.runner`): named arrays in, named arrays out."""
    call = open(folder / graph["files"][0], threads)
    names = [port["name"] for port in graph["inputs"]]
    return lambda feed: dict(zip(graph["outputs"], call([feed[name] for name in names]), strict=True))
