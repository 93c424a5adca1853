"""KerasHost: a Keras 3 model as a Host, on the TensorFlow or the torch backend."""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree

from secateur.arrays import to_numpy
from secateur.errors import ModelError
from secateur.keras import files
from secateur.keras.batches import flat, named_arrays, run, unpack
from secateur.keras.collect import collect
from secateur.keras.guard import check_inputs, check_model
from secateur.keras.hold import clear, held_masks, hold, release
from secateur.keras.layout import Description
from secateur.keras.naming import variables
from secateur.keras.rebuild import duplicate, rebuild
from secateur.layout import Layout
from secateur.plan import Plan, note_written, resized_masks, to_be_written
from secateur.pruning import earlier_zeros
from secateur.stats import Stats
from secateur.summary import of_axes


class KerasHost:
    """A model and its layout. `model` is another object after `resize`: Keras layers cannot change their sizes.

    example: one batch; needed for subclassed models, whose inputs are not known otherwise.
    loss: for gradients of models that are not compiled: a Keras loss or its name, or `loss(y, outputs)` with one value
        for each example, or their mean, which sample weights cannot reach.
    token_mask: inputs -> bool (batch, positions), True where a position is real, where Keras masks do not say it.
    layout: a layout written by hand; units cannot be removed then, as nothing is known of the layers.
    """

    def __init__(
        self,
        model: keras.Model,
        example: Any = None,
        *,
        layout: Layout | None = None,
        loss: Any = None,
        token_mask: Callable[[Any], Any] | None = None,
    ) -> None:
        if example is not None and isinstance(model, keras.Model) and not model.built:
            run(model, unpack(example)[0])
        check_model(model)
        self.model, self.example, self.loss, self.token_mask = model, example, loss, token_mask
        self._described: Description | None = None
        if layout is None:
            self._described = _describe(model, example)
            layout = self._described.layout
        self.layout = layout
        self.layout.check({name: tuple(v.shape) for name, v in variables(model).items()})
        self._written: dict[str, np.ndarray | None] = {}
        self.plan = earlier_zeros({name: self.read(name) for name in self.layout.linears})
        """What had already been pruned when the model was opened (its zeros), or None. `hold` holds it too, and
        `resize` cuts it to size; set it to None to let these weights grow again.
        """

    def __repr__(self) -> str:
        axes = of_axes(self.layout.axes.values())
        return f"KerasHost({type(self.model).__name__}: {axes}{'' if self.plan is None else f'; plan={self.plan}'})"

    # -- Host -----------------------------------------------------------------------------------------------------

    def _variable(self, param: str) -> Any:
        by_name = variables(self.model)
        if param not in by_name:
            raise ModelError(f"the model has no parameter {param!r}")
        return by_name[param]

    def read(self, param: str) -> np.ndarray:
        """The weight as numpy."""
        return np.asarray(keras.ops.convert_to_numpy(self._variable(param)))

    def write(self, param: str, array: Any) -> None:
        """Overwrite a weight."""
        variable, value = self._variable(param), to_numpy(array)
        if value.shape != tuple(variable.shape):
            raise ModelError(f"{param} has shape {tuple(variable.shape)}; cannot write {value.shape}")
        variable.assign(value)

    def collect(
        self,
        needs: Collection[str],
        data: Iterable[Any],
        axes: Sequence[str] | None = None,
        weights: Sequence[str] | None = None,
    ) -> Stats:
        """Sum the quantities `needs` over batches `(x, y)` or `x`, as `secateur.host.Host.collect` describes it."""
        return collect(
            self.model,
            self.layout,
            variables(self.model),
            needs,
            data,
            axes=axes,
            loss=self.loss,
            token_mask=self.token_mask,
            weights=weights,
        )

    def outputs(self, batch: Any) -> list[np.ndarray]:
        """All outputs in inference mode, of whatever type, in the order of Keras."""
        return flat(run(self.model, unpack(batch)[0]))

    def named_outputs(self, batch: Any) -> dict[str, np.ndarray]:
        """All outputs by name, as `secateur.agreement.leaves` names them, of whatever structure."""
        return named_arrays(run(self.model, unpack(batch)[0]))

    def masks(self, plan: Plan) -> dict[str, np.ndarray]:
        """Everything a plan removes, as bool arrays by weight."""
        plan = plan.check(self.layout)
        masks = {name: plan.mask(self.layout, name) for name in self.layout.params}
        return {name: mask for name, mask in masks.items() if mask is not None}

    @contextlib.contextmanager
    def masked(self, plan: Plan) -> Iterator[None]:
        """Zero what the plan removes; restore at the end."""
        masks, by_name = self.masks(plan), variables(self.model)
        saved = {name: np.array(keras.ops.convert_to_numpy(by_name[name])) for name in masks}
        try:
            self._prune(masks, plan)
            yield
        finally:
            for name, value in saved.items():
                by_name[name].assign(value)

    def apply(self, plan: Plan) -> None:
        """Write the plan's zeros, and the weights that repair has changed, into the model; nothing changes shape.

        Later training is not undone: a weight whose zeros are in place already keeps its values, unless this host wrote
        these zeros without the plan's weights, or with other weights.
        """
        masks = self.masks(plan)
        self._prune(masks, plan)
        for name in masks:
            note_written(self._written, name, plan)

    def _prune(self, masks: Mapping[str, np.ndarray], plan: Plan) -> None:
        by_name = variables(self.model)
        for name, mask in masks.items():
            new = self.read(name)[~mask].any() or to_be_written(self._written, name, plan)
            if name in plan.weights and new:
                self.write(name, plan.weights[name])
            clear(by_name[name], mask)

    @contextlib.contextmanager
    def hold(self, plan: Plan) -> Iterator[None]:
        """While the context lasts, zeros of the plan, and zeros from before it, stay zero in `fit`."""
        plan = plan if self.plan is None else plan.merge(self.plan)
        masks, by_name = self.masks(plan), variables(self.model)
        self.apply(plan)
        before = held_masks({name: by_name[name] for name in masks})
        hold(self.model, by_name, {name: mask & before.get(name, mask) for name, mask in masks.items()})
        try:
            yield
        finally:
            for name, mask in masks.items():
                clear(by_name[name], mask)
            release(self.model, {name: by_name[name] for name in masks if name not in before})
            hold(self.model, by_name, before)

    def copy(self) -> "KerasHost":
        """A copy of the model with the same layout; it is not compiled."""
        other = copy.copy(self)
        other.loss = self.loss if self.loss is not None else _compiled_loss(self.model)
        other.model = duplicate(self.model, self._known("copied"), self.layout)
        other._described = _describe(other.model, self.example)
        other._written = dict(self._written)
        return other

    def resize(self, plan: Plan) -> None:
        """Remove units for real: `model` becomes a new, functional model of smaller layers; compile it before `fit`."""
        plan = plan.check(self.layout)
        self.apply(Plan(masks=plan.masks, weights=plan.weights))
        if not plan.keep:
            return
        if self.loss is None:
            self.loss = _compiled_loss(self.model)
        if self.plan is not None:
            self.plan = resized_masks(self.layout, replace(self.plan, keep=plan.keep))
        self._written = {}
        self.model = rebuild(self.model, self._known("resized"), self.layout, plan.keep)
        self._described = _describe(self.model, self.example)
        self.layout = self._described.layout

    def _known(self, what: str) -> Description:
        if self._described is None:
            raise ModelError(f"a model with a layout written by hand cannot be {what}; leave layout= out")
        return self._described

    def save(self, folder: Path | str, plan: Plan | None = None, *, overwrite: bool = False) -> None:
        """Write a folder with `model.keras`, which `keras.saving.load_model` opens, and the plan."""
        files.save(self.model, folder, plan, overwrite=overwrite)


def _compiled_loss(model: keras.Model) -> Any:
    loss = getattr(model, "loss", None) if getattr(model, "compiled", False) else None
    return None if isinstance(loss, dict | list) else loss


def _describe(model: keras.Model, example: Any) -> Description:
    x = None if example is None else unpack(example)[0]
    first = None if x is None else tree.flatten(x)[0].shape
    batch, length = (1, 1) if first is None else (first[0], first[1] if len(first) > 1 else 1)
    return Description(model, symbols(model, x), batch, length)


def symbols(model: keras.Model, x: Any) -> Any:
    """Symbolic inputs: as the model declares them, else in the shape of the example."""
    if isinstance(model, keras.Sequential) or hasattr(model, "_functional") or _declares(model):
        declared = model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs
        declared = declared[0] if isinstance(declared, list) and len(declared) == 1 else declared
        return tree.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype, name=t.name), declared)
    check_inputs(x)
    return tree.map_structure(
        lambda a: keras.KerasTensor((None, *a.shape[1:]), keras.backend.standardize_dtype(a.dtype)), x
    )


def _declares(model: keras.Model) -> bool:
    return bool(getattr(model, "inputs", None))
