"""What the router of a mixture sends to each expert, and how much each expert adds: hooks beside the model's forward.

In transformers one module holds the weights of all experts. It is called with the hidden states, the indices of the
experts that the router chose for each token, and their gate weights. The module is found by its parameters, whose
first dimension is the axis of experts, and its arguments by their shapes. Called with one of the chosen experts at a
time, its own forward gives what that expert adds, whatever it computes.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.stats import Tally
from secateur.torch.stats.padding import TokenMask

_REMEDY = "use magnitude, gradient, taylor or brain_damage for its experts"


@contextlib.contextmanager
def watch_experts(
    model: nn.Module, layout: Layout, axes: Collection[str], needs: set[str], tally: Tally, token_mask: TokenMask
) -> Iterator[None]:
    """While the context lasts, every forward pass adds the quantities of experts in `needs` to `tally`.

    axes: names of axes; those of other kinds than experts are passed over.

    Raises ModelError for an axis of experts whose weights are not stacked in one module.
    """
    handles = []
    try:
        for axis in (layout.axis(name) for name in axes):
            if axis.kind == "expert":
                path = _module_of(layout, axis.name)
                hook = _ExpertHook(path, axis.name, axis.size, needs, tally, token_mask)
                handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _module_of(layout: Layout, axis: str) -> str:
    """Path of the module that holds the weights of all experts of an axis: (experts, ..., ...)."""
    for name, dims in layout.params.items():
        if len(dims) > 2 and dims[0] == ((axis,),):
            return name.rpartition(".")[0]
    raise ModelError(f"the experts of {axis} are not stacked in one weight, so what they add is not seen; {_REMEDY}")


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a module of experts.

    states: hidden states (tokens, hidden). index: the experts of each token, (tokens, top-k). gates: their weights,
    (tokens, top-k). All three are among args and kwargs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    states: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor

    def of_slot(self, module: nn.Module, slot: int) -> torch.Tensor:
        """What the expert in one place of the index adds to each token, float32 of shape (tokens, hidden)."""

        def one(value: Any) -> Any:
            return value[:, slot : slot + 1] if value is self.index or value is self.gates else value

        kwargs = {name: one(value) for name, value in self.kwargs.items()}
        return module.forward(*map(one, self.args), **kwargs).float()


def _call_of(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    """The call of the module of experts at `path`; ModelError when its arguments are not understood."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim() == 2]
    chosen = [value for value in tensors if not value.is_floating_point() and value.dtype != torch.bool]
    floating = [value for value in tensors if value.is_floating_point()]
    if len(chosen) == 1 and len(floating) == 2:
        for states, gates in (floating, floating[::-1]):
            if gates.shape == chosen[0].shape and states.shape[0] == gates.shape[0]:
                return _Call(args, kwargs, states, chosen[0], gates)
    raise ModelError(
        f"{path} is not called with the states of tokens, the experts of each and their weights, so what its experts "
        f"add is not seen; {_REMEDY}"
    )


@dataclass(frozen=True, eq=False)
class _ExpertHook:
    """Adds what the experts of one module are sent and add, for real tokens, to a tally. experts: their number."""

    path: str
    axis: str
    experts: int
    needs: set[str]
    tally: Tally
    token_mask: TokenMask

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = _call_of(self.path, args, kwargs)
        mask = self.token_mask(self.path, tuple(call.states.shape[:1]))
        if "expert_routed" in self.needs:
            self._add("expert_routed", call.index, torch.ones_like(call.gates), mask)
        if "expert_output" in self.needs:
            total, norms = torch.zeros_like(call.states, dtype=torch.float32), []
            for slot in range(call.index.shape[1]):
                added = call.of_slot(module, slot)
                norms.append(added.norm(dim=-1))
                total += added
            _explain(self.path, total, output)
            self._add("expert_output", call.index, torch.stack(norms, dim=1), mask)

    def _add(self, quantity: str, index: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add values (tokens, top-k) to the experts that they belong to. mask: the real tokens, None for all."""
        if mask is not None:
            index, values = index[mask], values[mask]
        own = index < self.experts  # a larger number stands for an expert that another machine holds
        sums = torch.zeros(self.experts, dtype=torch.float64, device=values.device)
        sums.index_add_(0, index[own].long(), values[own].double())
        self.tally.add(quantity, self.axis, sums.cpu().numpy(), float(index.shape[0]))


def _explain(path: str, total: torch.Tensor, output: Any) -> None:
    """ModelError for a module whose output is not the sum of what its experts add one by one."""
    if isinstance(output, torch.Tensor) and output.shape == total.shape:
        tolerance = 2e-2 if output.dtype.itemsize == 2 else 1e-3
        if bool((total - output.float()).abs().max() <= tolerance * output.abs().max().clamp_min(1.0).float()):
            return
    raise ModelError(
        f"the output of {path} is not the sum of what its experts add, so they are not scored by it; {_REMEDY}"
    )
