"""rebuild: a model of the same layers with smaller sizes. Layers are made anew from changed configs, called in the
order of the trace, and take over their weights. The result is a functional model of flat layers: sizes may differ by
layer, and its `.keras` files need no more to load than those of the original.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers as kl
from keras import tree

from secateur.dims import extent
from secateur.errors import ModelError, printable
from secateur.keras.layout import Description
from secateur.keras.naming import DOT, layers, variables
from secateur.keras.rules import base_of, letters
from secateur.keras.trace import LayerCall, line
from secateur.layout import Keep, Layout


def rebuild(model: keras.Model, described: Description, layout: Layout, keep: Keep) -> keras.Model:
    """The model with only the kept units; weights carried, compile state not.

    Raises ModelError when a layer cannot be made from its config.
    """
    resized = layout.resized(keep)
    shapes = {id(v): resized.shape(name) for name, v in variables(model).items() if name in layout.params}
    with keras.saving.custom_object_scope(classes(model)):
        new = _replay(model, described, resized, shapes)
    _carry(model, new, layout, keep)
    new.trainable = model.trainable
    return new


def duplicate(model: keras.Model, described: Description, layout: Layout) -> keras.Model:
    """An independent copy: made from the model's config, of the same class; where that fails, with a warning that says
    why, a functional model of the same layers.
    """
    try:
        with keras.saving.custom_object_scope(classes(model)):
            new = type(model).from_config(model.get_config())
            if not new.built:
                new(
                    tree.map_structure(
                        lambda t: keras.ops.zeros([n or 1 for n in t.shape], t.dtype), described.trace.inputs
                    )
                )
            if variables(new).keys() != variables(model).keys():
                raise ModelError("its layers get other names each time; give them name=")
            _carry(model, new, layout, {})
    except Exception as error:  # `get_config` and `from_config` are the user's code
        reason = "it has no get_config" if isinstance(error, NotImplementedError) else line(error)
        warnings.warn(
            f"{printable(model.name)} ({type(model).__name__}) cannot be made from its config ({reason}), so its copy "
            "is a functional model of the same layers",
            stacklevel=2,
        )
        return rebuild(model, described, layout, {})
    return new


def classes(model: keras.Model) -> dict[str, type]:
    """The layer types of a model by name, so that its config can be read without registering them."""
    return {type(layer).__name__: type(layer) for _, layer in layers(model) if _is_custom(layer)} | (
        {type(model).__name__: type(model)} if _is_custom(model) else {}
    )


def _is_custom(layer: keras.Layer) -> bool:
    return not type(layer).__module__.startswith("keras.")


def _replay(
    model: keras.Model, described: Description, resized: Layout, shapes: Mapping[int, tuple[int, ...]]
) -> keras.Model:
    made: dict[int, Any] = {}
    traced = described.trace.inputs
    inputs = tree.map_structure(lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name), traced)
    replayed = {id(a): b for a, b in zip(tree.flatten(traced), tree.flatten(inputs), strict=True)}

    def renewed(value: Any) -> Any:
        if isinstance(value, keras.KerasTensor):
            return replayed[id(value)]
        return made.get(id(value), value) if isinstance(value, keras.Layer) else value

    for step in described.trace.steps:
        if isinstance(step.operation, keras.Layer) and id(step.operation) not in made:
            made[id(step.operation)] = _smaller(step, described, resized, shapes)
        operation = made.get(id(step.operation), step.operation)
        kwargs = {k: v for k, v in step.kwargs.items() if v is not None}
        result = operation(*tree.map_structure(renewed, step.args), **tree.map_structure(renewed, kwargs))
        for old, new in zip(step.outputs, tree.flatten(result), strict=True):
            replayed[id(old)] = new
    outputs = tree.map_structure(renewed, described.trace.outputs)
    return keras.Model(inputs, outputs, name=model.name)


def _smaller(step: LayerCall, described: Description, resized: Layout, shapes: Mapping[int, tuple[int, ...]]) -> Any:
    layer = step.operation
    try:
        config = layer.get_config()
    except NotImplementedError:
        raise ModelError(
            f"{step.path} ({type(layer).__name__}) has no get_config, so it cannot be made anew; write one"
        ) from None
    config["name"] = (step.path or layer.name).replace(".", DOT)
    config.update(sizes(layer, step, described, resized, shapes))
    try:
        new = type(layer).from_config(config)
    except Exception as error:  # the user's code
        raise ModelError(
            f"{step.path} ({type(layer).__name__}) cannot be made from its config: {line(error)}; mend its get_config "
            "and from_config"
        ) from error
    new.trainable = layer.trainable
    return new


def sizes(
    layer: Any, step: LayerCall, described: Description, resized: Layout, shapes: Mapping[int, tuple[int, ...]]
) -> dict[str, Any]:
    """Config entries of a layer that mirror the sizes of its weights."""
    base = base_of(layer)

    def shape(variable: Any) -> tuple[int, ...]:
        return shapes.get(id(variable), tuple(variable.shape))

    if base is kl.Dense:
        return {"units": shape(layer.kernel)[1]}
    if base is kl.Embedding:
        return {"output_dim": shape(layer.embeddings)[1]}
    if base in (kl.Conv1D, kl.Conv2D, kl.Conv3D):
        return {"filters": shape(layer._kernel)[-1]}
    if base is kl.EinsumDense:
        _, weight, output = letters(layer, len(step.args[0].shape))
        size_of = dict(zip(weight, shape(layer.kernel), strict=True))
        config = layer.get_config()["output_shape"]
        declared = list(config) if isinstance(config, list | tuple) else [config]
        tail = output[len(output) - len(declared) :]
        return {"output_shape": tuple(size_of.get(letter, n) for letter, n in zip(tail, declared, strict=True))}
    if base is kl.MultiHeadAttention:
        _, heads, key_dim = shape(layer.query_dense.kernel)
        out = shape(layer.output_dense.kernel)[2:]
        same = layer.get_config()["output_shape"] is None
        return {
            "num_heads": heads,
            "key_dim": key_dim,
            "value_dim": shape(layer.value_dense.kernel)[2],
            "output_shape": None if same else out,
        }
    if base is kl.GroupQueryAttention:
        query, key = shape(layer._query_dense.kernel), shape(layer._key_dense.kernel)
        return {"num_query_heads": query[1], "num_key_value_heads": key[1]}
    if base is kl.Reshape:
        dims = described.dims(step.outputs[0])[1:]
        return {"target_shape": tuple(-1 if d is None else extent(d, resized.sizes) for d in dims)}
    return {}


def _carry(model: keras.Model, new: keras.Model, layout: Layout, keep: Keep) -> None:
    targets = variables(new)
    for name, variable in variables(model).items():
        if name not in targets:
            raise ModelError(f"{name} has no place in the rebuilt model; please report the layer")
        value = keras.ops.convert_to_numpy(variable)
        kept = layout.kept(name, keep) if name in layout.params else None
        for dim, alive in enumerate(kept or ()):
            if alive is not None:
                value = np.compress(alive, value, axis=dim)
        targets[name].assign(value)
    _keep_scale(model, new)


def _keep_scale(model: keras.Model, new: keras.Model) -> None:
    """Attention divides by sqrt(key_dim): where key_dim shrank, scale the query projection to keep the scores."""
    before = {path: layer for path, layer in layers(model) if base_of(layer) is kl.MultiHeadAttention}
    for path, layer in layers(new):
        if path in before and layer.key_dim != before[path].key_dim:
            factor = (layer.key_dim / before[path].key_dim) ** 0.5
            for variable in layer.query_dense.trainable_variables + layer.query_dense.non_trainable_variables:
                variable.assign(variable * factor)
