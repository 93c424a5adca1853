"""How the outputs of masked and shrunk models compare when a plan removes tokens, or hidden width between layer norms.

Most removals are exact: the same inputs give the same outputs. Removing tokens renumbers the kept tokens, so inputs are
translated and only the logits of kept tokens are compared. Removing hidden width is exact under RMSNorm (its
weight is scaled, see `norms`), but no LayerNorm of fewer channels equals the masked one: there the contract is
"shrink, then fine-tune", and `verify` checks that the model runs and that its outputs are finite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.check import difference
from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.torch.base.batches import arguments, with_decoder_inputs
from secateur.torch.shrink.norms import WIDE, centred_norms

TOKENS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Contract:
    """How the outputs of a masked model and of the shrunk one compare.

    inexact: why they differ by design; empty when they do not.
    tokens: kept token ids in order, when tokens are removed.
    of: size of the vocabulary before, when tokens are removed.
    widths: (size, kept units) of hidden and vocabulary axes: outputs of that width are compared on the kept units.
    complete: a batch in old token ids as the model takes it, with the inputs that it would make from labels.
    """

    inexact: str = ""
    tokens: np.ndarray | None = None
    of: int = 0
    widths: tuple[tuple[int, np.ndarray], ...] = ()
    complete: Callable[[Any], Any] = lambda batch: batch

    def before(self, batch: Any) -> Any:
        """The batch for the masked model, without labels; the first kept token stands in for removed tokens."""
        if self.tokens is None:
            return batch
        known = np.full(self.of, self.tokens[0])
        known[self.tokens] = self.tokens
        return self._translated(batch, known)

    def after(self, batch: Any) -> Any:
        """A batch with the token ids of the shrunk model."""
        if self.tokens is None:
            return batch
        new = np.zeros(self.of, dtype=np.int64)
        new[self.tokens] = np.arange(len(self.tokens))
        return self._translated(batch, new)

    def expected(self, outputs: list[np.ndarray], got: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Outputs of the masked model without the logits of removed tokens and the channels that go.

        got: outputs of the shrunk model, which distinguish axes of equal size: an output that has kept its width is
        returned whole, and if several axes fit, the axis whose kept channels are closest to `got` is taken.
        """
        pairs = zip(outputs, got if got is not None else [None] * len(outputs), strict=False)
        return [self._narrowed(masked, shrunk) for masked, shrunk in pairs]

    def _narrowed(self, masked: np.ndarray, shrunk: np.ndarray | None) -> np.ndarray:
        if not masked.ndim or (shrunk is not None and masked.shape == shrunk.shape):
            return masked
        candidates = [masked[..., units] for size, units in self.widths if size == masked.shape[-1]]
        if shrunk is not None:
            candidates = [narrow for narrow in candidates if narrow.shape == shrunk.shape]
            candidates.sort(key=lambda narrow: difference([narrow], [shrunk]))
        return candidates[0] if candidates else masked

    def _translated(self, batch: Any, table: np.ndarray) -> Any:
        """The batch without labels, with its token ids looked up in a table; negative ids are unchanged."""

        def translate(ids: Any) -> Any:
            if not isinstance(ids, torch.Tensor):
                return ids
            new_ids = torch.as_tensor(table, device=ids.device, dtype=ids.dtype)
            return torch.where(ids < 0, ids, new_ids[ids.clamp_min(0)])

        given = self.complete(batch)
        if isinstance(given, Mapping):
            inputs = {name: value for name, value in given.items() if name != "labels"}
            tokens = [name for name in TOKENS if name in inputs] or [k for k, v in inputs.items() if not _is_float(v)]
            return {name: translate(value) if name in tokens else value for name, value in inputs.items()}
        return tuple(value if _is_float(value) else translate(value) for value in given)


def contract_of(model: nn.Module, layout: Layout, plan: Plan) -> Contract:
    """The contract of a plan, from the kinds of the axes that it prunes and the norms over those axes."""
    inexact, tokens, vocabulary, widths = "", None, 0, []
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
            tokens, vocabulary = np.sort(np.asarray(units, dtype=np.int64)), axis.size
    return Contract(inexact, tokens, vocabulary, tuple(widths), partial(_complete, model))


def _complete(model: nn.Module, batch: Any) -> Any:
    return arguments(model, with_decoder_inputs(model, batch))


def _is_float(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
