"""TorchHost: a PyTorch or Hugging Face model as a Host."""

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.agreement import leaves
from secateur.arrays import to_numpy
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.plan import Plan, note_written, resized_masks, to_be_written
from secateur.pruning import earlier_zeros
from secateur.stats import Stats
from secateur.summary import of_axes
from secateur.torch.base.batches import arguments, evaluating, run, to_device
from secateur.torch.base.manifest import Changes, named_tensors
from secateur.torch.files.companions import companions_from
from secateur.torch.files.saving import attach, save
from secateur.torch.shrink.equality import Contract, contract_of
from secateur.torch.shrink.masking import bypassed
from secateur.torch.shrink.probe import derive
from secateur.torch.shrink.resize import resize
from secateur.torch.stats.collect import Loss, collect
from secateur.torch.tokens.install import all_tokens, keep_blocks
from secateur.torch.train.hold import hold


class TorchHost:
    """A model and its layout.

    model: the model, which is changed in place.
    example: a batch that the model can run, in any form of `secateur.torch.base.batches`.
    layout: a layout written by hand, for models that cannot be traced.
    loss: `loss(model, batch) -> scalar tensor`, for models whose output has no `.loss`: a mean over the examples.
    plan: what was pruned before the model was opened.
    changes: how the model differs from the model that its class builds.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        layout: Layout | None = None,
        loss: Loss | None = None,
        plan: Plan | None = None,
        changes: Changes | None = None,
    ) -> None:
        self.model = model
        self.example: Any = None if example is None else arguments(model, example)
        self.loss = loss
        self.plan = plan
        """What was pruned before the model was opened (its zeros, see `secateur.pruning.earlier_zeros`), or None.

        `hold` holds these zeros too, and `resize` cuts them to size; set it to None to let these weights grow again.
        """
        self.changes = changes
        self.source: str | None = None
        """The folder or hub id that the model was loaded from; `save` takes the tokenizer along that lies there."""
        self._is_double = False
        self._by_hand = layout is not None
        self._layout = None if layout is None else self._marked(layout)
        self.layout.check({name: tuple(p.shape) for name, p in named_tensors(self.model).items()})
        weights = {name: self.read(name) for name in self.layout.linears}
        self._written: dict[str, np.ndarray | None] = {}
        zeros = earlier_zeros({name: weight for name, weight in weights.items() if not weight.is_meta})
        self.plan = plan.merge(zeros) if plan is not None and zeros is not None else plan or zeros

    def __repr__(self) -> str:
        axes = "axes not traced since the last removal" if self._layout is None else of_axes(self._layout.axes.values())
        return f"TorchHost({type(self.model).__name__}: {axes}{'' if self.plan is None else f'; plan={self.plan}'})"

    @classmethod
    def untraced(cls, model: nn.Module) -> "TorchHost":
        """A host that only runs the model: outputs, reading and writing work, nothing can be pruned."""
        return cls(model, None, layout=Layout({}, {}))

    @property
    def layout(self) -> Layout:
        """The axes of the model in its present state; after a removal the first access traces them."""
        if self._layout is None:
            with all_tokens():
                self._layout = self._marked(derive(self.model, self.example))
        return self._layout

    @layout.setter
    def layout(self, layout: Layout) -> None:
        self._layout = layout

    def _marked(self, layout: Layout) -> Layout:
        """The layout, with the model's buffers among its parameters listed as buffers."""
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        return replace(layout, buffers=frozenset(layout.params) & frozenset(buffers))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters that the layout names."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: named[name] for name in self.layout.params if name in named}

    # -- Host -----------------------------------------------------------------------------------------------------

    def read(self, param: str) -> torch.Tensor:
        """The parameter or buffer, detached."""
        tensors = named_tensors(self.model)
        if param not in tensors:
            raise ModelError(f"the model has no parameter {param!r}")
        return tensors[param].detach()

    def write(self, param: str, array: Any) -> None:
        """Overwrite a parameter in place."""
        target = self.read(param)
        value = torch.as_tensor(array, dtype=target.dtype, device=target.device)
        if value.shape != target.shape:
            raise ModelError(f"{param} has shape {tuple(target.shape)}; cannot write {tuple(value.shape)}")
        target.copy_(value)

    def collect(
        self,
        needs: Collection[str],
        data: Iterable[Any],
        axes: Sequence[str] | None = None,
        weights: Sequence[str] | None = None,
    ) -> Stats:
        """Collect statistics; `secateur.host.Host.collect` describes the arguments."""
        with all_tokens():  # a mask of padding has the length of the whole texts
            return collect(
                self.model, self.layout, self.parameters(), needs, data, axes=axes, loss=self.loss, weights=weights
            )

    def outputs(self, batch: Any) -> list[np.ndarray]:
        """All outputs in evaluation mode, of whatever type and structure, without caches."""
        return list(self.named_outputs(batch).values())

    def named_outputs(self, batch: Any) -> dict[str, np.ndarray]:
        """Outputs of a batch in evaluation mode by name, as `secateur.agreement.leaves` names them."""
        batch = to_device(batch, self.model)
        with evaluating(self.model), torch.no_grad():
            return dict(leaves(run(self.model, _doubled(batch) if self._is_double else batch), to_array=_array))

    def in_double(self) -> "TorchHost | None":
        """A copy that computes in float64; None unless the model computes in float32."""
        if any(p.is_floating_point() and p.dtype != torch.float32 for p in self.model.parameters()):
            return None
        other = self.copy()
        other.model.double()
        other._is_double = True
        return other

    @contextlib.contextmanager
    def masked(self, plan: Plan) -> Iterator[None]:
        """A context in which removed units are zero, removed layers bypassed, and removed experts never chosen."""
        plan = plan.check(self.layout)
        saved: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(bypassed(self.model, self.layout, plan))
            try:
                for name in self.layout.params:
                    mask = plan.mask(self.layout, name)
                    changes = mask is not None or name in plan.weights
                    if changes and not self._in_removed_layer(name, plan):
                        saved[name] = self.read(name).clone()
                        self._prune(name, mask, plan)
                yield
            finally:
                for name, value in saved.items():
                    self.read(name).copy_(value)

    def _in_removed_layer(self, param: str, plan: Plan) -> bool:
        return any(
            self.layout.axis(axis).kind == "layer" and self.layout.member_of(param, axis) not in (None, *units)
            for axis, units in plan.keep.items()
        )

    def apply(self, plan: Plan) -> None:
        """Write the plan's zeros, and the weights that repair has changed, into the model; nothing changes shape.

        Later training is not undone: a weight that already has its zeros keeps its values, unless this host wrote the
        zeros without the plan's weights, or with other weights. A weight of the plan without zeros, such as a bias, is
        written once.
        """
        plan = plan.check(self.layout)
        for name in self.layout.params:
            mask = plan.mask(self.layout, name)
            if mask is not None or name in plan.weights:
                self._prune(name, mask, plan)
                note_written(self._written, name, plan)

    def _prune(self, name: str, mask: np.ndarray | None, plan: Plan) -> None:
        target = self.read(name)
        if mask is None:
            if self._written.get(name) is not plan.weights[name]:
                self.write(name, plan.weights[name])
            return
        gone = ~torch.from_numpy(mask).to(target.device)
        if name in plan.weights:
            # Zeros of units alone say nothing: a bias that is zero everywhere has them in place from the start.
            is_unlike = self._written.get(name) is not plan.weights[name]
            is_fresh = bool(target[gone].any()) or to_be_written(self._written, name, plan)
            if is_fresh if name in plan.masks else is_unlike:
                self.write(name, plan.weights[name])
        target.masked_fill_(gone, 0)

    @contextlib.contextmanager
    def hold(self, plan: Plan) -> Iterator[None]:
        """A context in which zeros of the plan, and earlier zeros, stay zero; see `secateur.torch.train.hold`."""
        plan = (plan if self.plan is None else plan.merge(self.plan)).check(self.layout)
        parameters = self.parameters()
        self.apply(Plan(masks=plan.masks, weights=plan.weights))
        arrays = {name: plan.mask(self.layout, name) for name in parameters}
        masks = {name: torch.from_numpy(mask) for name, mask in arrays.items() if mask is not None}
        with contextlib.ExitStack() as stack:
            stack.enter_context(bypassed(self.model, self.layout, plan))
            stack.enter_context(hold(parameters, masks))
            yield

    def copy(self) -> "TorchHost":
        """A host of a deep copy of the model, with the same layout."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other._written = dict(self._written)
        return other

    def resize(self, plan: Plan) -> None:
        """Remove units from the model. The layout changes too: names of layers follow their new numbers."""
        plan = plan.check(self.layout)
        self.apply(Plan(masks=plan.masks, weights=plan.weights))
        if not plan.keep:
            return
        contract = self.contract(plan)
        earlier = None if self.plan is None else resized_masks(self.layout, replace(self.plan, keep=plan.keep))
        changes = resize(self.model, self.layout, plan.keep)
        keep_blocks(self.model, changes.kept)
        attach(self.model)
        self.changes = changes if self.changes is None else self.changes.merge(changes)
        self.example = contract.after(self.example)
        self._layout = self._marked(self.layout.resized(plan.keep)) if self._by_hand else None
        self.plan, self._written = earlier, {}

    def contract(self, plan: Plan) -> Contract:
        """How the outputs of the masked and the shrunk model compare."""
        return contract_of(self.model, self.layout, plan.check(self.layout))

    def save(self, folder: Path | str, plan: Plan | None = None, *, overwrite: bool = False, **extra: Any) -> None:
        """Write a folder that `from_pretrained` loads (after `import secateur` where sizes differ by layer).

        extra: more arguments of `secateur.torch.files.saving.save`. Without `tokenizer`, `processor` and `carried`
            those of the folder that the model was opened from go along.
        """
        if {"tokenizer", "processor", "carried"}.isdisjoint(extra):
            extra |= companions_from(self.model, self.source)
        save(self.model, folder, changes=self.changes, plan=plan, overwrite=overwrite, **extra)


def _doubled(batch: Any) -> Any:
    """The batch with its numbers in float64; integers stay."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return {k: double(v) for k, v in batch.items()} if isinstance(batch, Mapping) else tuple(map(double, batch))


def _array(value: Any) -> np.ndarray | None:
    """A tensor as numpy, None for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    return to_numpy(dense)
