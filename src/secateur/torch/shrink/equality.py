"""What masked and shrunk models owe each other when a plan removes tokens, or hidden width between layer norms.

Most removals are exact: the same inputs give the same outputs. Removing tokens renumbers the others, so inputs are
translated and only the logits of kept tokens are compared. Removing hidden width is exact under RMSNorm (its
weight is scaled, see `norms`), but no LayerNorm of fewer channels equals the masked one: there the contract is
"shrink, then fine-tune", and what is verified is that the model runs and that its outputs are finite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.torch.base.batches import with_decoder_inputs
from secateur.torch.shrink.norms import WIDE, centred_norms

TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Contract:
    """How the outputs of a masked model and of the shrunk one compare.

    inexact: why they differ by design, or empty.
    tokens: kept token ids in order, of so many, when tokens are removed.
    complete: gives a batch, still in old tokens, the inputs that the model would make of its labels.
    widths: (size, kept units) of hidden and vocabulary axes: outputs as wide are compared on what is kept.
    """

    inexact: str = ""
    tokens: np.ndarray | None = None
    of: int = 0
    widths: tuple[tuple[int, np.ndarray], ...] = ()
    complete: Callable[[Any], Any] = lambda batch: batch

    def before(self, batch: Any) -> Any:
        """The batch for the masked model: tokens that go are replaced by the first that stays, labels left out."""
        if self.tokens is None:
            return batch
        known = np.full(self.of, self.tokens[0])
        known[self.tokens] = self.tokens
        return self._mapped(batch, known)

    def after(self, batch: Any) -> Any:
        """The same batch for the shrunk model, in new token ids."""
        if self.tokens is None:
            return batch
        new = np.zeros(self.of, dtype=np.int64)
        new[self.tokens] = np.arange(len(self.tokens))
        return self._mapped(batch, new)

    def expected(self, outputs: list[np.ndarray], got: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Outputs of the masked model without the logits of removed tokens and the channels that go.

        got: outputs of the shrunk model, which tell two axes of one size apart: what has kept its width is left as it
        is, and where several axes could be meant it is the one that comes closest.
        """
        pairs = zip(outputs, got if got is not None else [None] * len(outputs), strict=False)
        return [self._narrowed(a, b) for a, b in pairs]

    def _narrowed(self, a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
        if not a.ndim or (b is not None and a.shape == b.shape):
            return a
        fitting = [a[..., units] for size, units in self.widths if size == a.shape[-1]]
        if b is not None:
            fitting = [c for c in fitting if c.shape == b.shape]
            fitting.sort(key=lambda c: float(np.abs(c - b).max(initial=0.0)))
        return fitting[0] if fitting else a

    def _mapped(self, batch: Any, table: np.ndarray) -> Any:
        def one(name: str, value: Any) -> Any:
            if name not in TOKENS or not isinstance(value, torch.Tensor):
                return value
            where = torch.as_tensor(table, device=value.device, dtype=value.dtype)
            return torch.where(value < 0, value, where[value.clamp_min(0)])

        if isinstance(batch, Mapping):
            return {k: one(k, v) for k, v in self.complete(batch).items() if k != "labels"}
        if isinstance(batch, tuple | list):
            return type(batch)(one("input_ids" if not _is_float(v) else "", v) for v in batch)
        raise ModelError(f"a batch of type {type(batch).__name__} cannot be translated to the kept tokens; use a dict")


def contract_of(model: nn.Module, layout: Layout, plan: Plan) -> Contract:
    """The contract of a plan, from the kinds of the axes it prunes and the norms that they pass."""
    inexact, tokens, of, widths = "", None, 0, []
    for name, units in plan.keep.items():
        axis = layout.axis(name)
        if len(units) == axis.size:
            continue
        if axis.kind in (*WIDE, "vocab"):
            widths.append((axis.size, np.sort(np.asarray(units, dtype=np.int64))))
        if axis.kind in WIDE:
            norms = centred_norms(model, layout, name)
            if norms:
                inexact = (
                    f"{name} passes {len(norms)} norms that subtract the mean (such as {norms[0]}), which no norm of "
                    "fewer channels equals: shrink, then fine-tune"
                )
        if axis.kind == "vocab":
            if tokens is not None:
                raise ModelError("tokens of one vocabulary at a time can be removed")
            tokens, of = np.sort(np.asarray(units, dtype=np.int64)), axis.size
    return Contract(inexact, tokens, of, tuple(widths), partial(with_decoder_inputs, model))


def _is_float(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
