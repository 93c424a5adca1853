"""export: a Keras model as a file for a runtime.

Targets: `litert` (Keras' own export), `tflite` (TensorFlow's converter, with LiteRT's sparse weight format on request),
`onnx`, `openvino`, `saved_model`. What a backend cannot write is an error that says which can.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree

from secateur.errors import ModelError
from secateur.files import check_output, finish, new_file, work_beside
from secateur.files.renames import discard, sync
from secateur.keras.batches import run
from secateur.keras.trace import line

TARGETS = {
    "litert": ("tensorflow",),
    "tflite": ("tensorflow",),
    "onnx": ("tensorflow", "torch"),
    "openvino": ("tensorflow", "torch"),
    "saved_model": ("tensorflow",),
}
"""Target -> backends that write it correctly."""

SUFFIX = {"litert": ".tflite", "tflite": ".tflite", "onnx": ".onnx", "openvino": ".xml", "saved_model": ""}


def export(
    model: keras.Model, path: Path | str, target: str, example: Any, *, sparse: bool = False, overwrite: bool = False
) -> Path:
    """Write a model for a runtime, in the shape of the example inputs (LiteRT) or for any batch (other targets).

    example: inputs of the model (no labels). sparse: LiteRT's sparse weight format, for `tflite` only; it stores the
    tensors that have enough zeros by block or by value, and computes them as if they were dense.

    Raises ModelError: unknown target, a backend that cannot write it, an operation that the target lacks.
    """
    path = Path(path)
    backend = keras.backend.backend()
    if target not in TARGETS:
        raise ModelError(f"no target {target!r} for Keras models; there is {', '.join(TARGETS)}")
    if backend not in TARGETS[target]:
        raise ModelError(
            f"{target} is not written right on the {backend} backend; start with "
            f"KERAS_BACKEND={' or '.join(TARGETS[target])}"
        )
    if SUFFIX[target] and path.suffix != SUFFIX[target]:
        raise ModelError(f"{path} must end in {SUFFIX[target]} for {target}")
    if sparse and target != "tflite":
        raise ModelError(f"the sparse weight format is LiteRT's; use target tflite, not {target}")
    check_output(path, overwrite=overwrite)
    run(model, example)  # Keras exports only what has been called
    with work_beside(path, overwrite=overwrite) as (claim, folder), quiet():
        written = folder / path.name
        try:
            _WRITERS["sparse tflite" if sparse else target](model, written, example)
        except Exception as error:  # every exporter breaks in its own way
            raise ModelError(
                f"{model.name} cannot be written for {target}: {line(error.__cause__ or error)}"
            ) from error
        for made in sorted(folder.iterdir()):
            if made != written:
                with new_file(path.parent / made.name, overwrite=overwrite) as beside:
                    discard(beside)
                    made.replace(beside)
        sync(written)
        finish(claim, written, path)
    return path


def _signature(example: Any, batch: int | None) -> list[Any]:
    def spec(x: Any) -> Any:
        return keras.InputSpec(shape=(batch or len(x), *x.shape[1:]), dtype=keras.backend.standardize_dtype(x.dtype))

    return [tree.map_structure(spec, example)]


def _litert(model: keras.Model, path: Path, example: Any) -> None:
    model.export(str(path), format="litert", input_signature=_signature(example, None), verbose=False)


def _tflite(model: keras.Model, path: Path, example: Any) -> None:
    path.write_bytes(_converter(model, example).convert())


def _sparse_tflite(model: keras.Model, path: Path, example: Any) -> None:
    import tensorflow as tf

    converter = _converter(model, example)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    path.write_bytes(converter.convert())


def _converter(model: keras.Model, example: Any) -> Any:
    import tensorflow as tf

    arrays = tree.map_structure(np.asarray, example)
    inputs = tree.map_structure(lambda x: keras.Input(batch_shape=x.shape, dtype=str(x.dtype)), arrays)
    return tf.lite.TFLiteConverter.from_keras_model(keras.Model(inputs, model(inputs, training=False)))


def _onnx(model: keras.Model, path: Path, example: Any) -> None:
    if keras.backend.backend() == "torch":  # Keras' own export bakes the batch in there
        import torch

        tensors = tuple(torch.as_tensor(np.asarray(x)) for x in tree.flatten(example))
        batch = ({0: torch.export.Dim.DYNAMIC},) * len(tensors)  # `forward` takes *args, which is one tuple
        program = torch.onnx.export(model.eval(), tensors, dynamo=True, dynamic_shapes=(batch,))
        program.save(path)
        return
    model.export(str(path), format="onnx", verbose=False)
    _spell_erfc(path)


def _spell_erfc(path: Path) -> None:
    """Write 1 - erf(x) for erfc(x): the exact GELU of TensorFlow uses it, and ONNX has no such operation."""
    import onnx
    from onnx import helper, numpy_helper

    program = onnx.load(path)
    nodes = []
    for node in program.graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        middle = f"{node.output[0]}_erf"
        nodes.append(helper.make_node("Erf", list(node.input), [middle], name=f"{node.name}_erf"))
        nodes.append(helper.make_node("Sub", ["secateur_one", middle], list(node.output), name=f"{node.name}_sub"))
    if len(nodes) > len(program.graph.node):
        program.graph.initializer.append(numpy_helper.from_array(np.array(1.0, "float32"), "secateur_one"))
        del program.graph.node[:]
        program.graph.node.extend(nodes)
        onnx.save(program, path)


def _openvino(model: keras.Model, path: Path, example: Any) -> None:
    model.export(str(path), format="openvino", verbose=False)


def _saved_model(model: keras.Model, path: Path, example: Any) -> None:
    model.export(str(path), format="tf_saved_model", verbose=False)


_WRITERS: dict[str, Callable[[keras.Model, Path, Any], None]] = {
    "litert": _litert,
    "tflite": _tflite,
    "sparse tflite": _sparse_tflite,
    "onnx": _onnx,
    "openvino": _openvino,
    "saved_model": _saved_model,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of exporters off the terminal."""
    disabled_before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled_before)
