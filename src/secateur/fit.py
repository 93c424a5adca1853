"""Which criterion scores which pattern and which kinds of units: what does not fit is refused before data is read.

The quantities that a criterion asks for decide it. Attention scores are those of heads, and what a router sends is that
of experts. What is measured where a unit is read needs a linear weight that reads single units: there is none for whole
layers and experts, for tokens, and for the width in which queries and keys are compared. Everything else is summed over
the weights of a unit.
"""

from collections.abc import Collection, Iterable

from secateur.errors import PlanError
from secateur.layout import Axis, Layout
from secateur.select import Pattern, Unit
from secateur.stats import OF_AXIS

HEADS = ("head", "kv")
UNREAD = ("qk", "vocab", "expert", "layer")
KINDS = (*HEADS, "v", "ffn", "dense", "hidden", "embedding", *UNREAD)
"""Kinds of units that a layout can have, of those that people prune; see `secateur.torch.trace.axis_kinds`."""


def scores(needs: Iterable[str], kind: str) -> bool:
    """Whether a criterion that asks for these quantities scores units of a kind; True for a kind that is not known."""
    of_units = [need for need in needs if need in OF_AXIS]
    if any(need.startswith("attn_") for need in of_units):
        return kind in HEADS or kind not in KINDS
    if any(need.startswith("expert_") for need in of_units):
        return kind == "expert" or kind not in KINDS
    return not of_units or kind not in UNREAD


def check_pattern(name: str, needs: Collection[str], pattern: Pattern) -> None:
    """PlanError when a criterion cannot score a pattern, as far as the pattern itself says it.

    name: of the criterion. needs: the quantities that it asks for.
    """
    if not isinstance(pattern, Unit):
        if any(need in OF_AXIS for need in needs):
            raise PlanError(f"criterion {name} scores units, not weights; use a pattern such as head or ffn")
        return
    for kind in pattern.what:
        if not scores(needs, kind):
            raise PlanError(_refusal(name, needs, f"units of kind {kind!r}"))


def check_axes(name: str, needs: Collection[str], layout: Layout, axes: Iterable[Axis]) -> None:
    """PlanError when a criterion cannot score one of the axes of a layout."""
    for axis in axes:
        unread = any(need in OF_AXIS and not need.startswith(("attn_", "expert_")) for need in needs)
        if not scores(needs, axis.kind) or (
            unread and not any(layout.reads(weight, axis.name) for weight in layout.linears)
        ):
            raise PlanError(_refusal(name, needs, f"the {axis.kind} units of {axis.name}"))


def _refusal(name: str, needs: Collection[str], what: str) -> str:
    known = ", ".join(kind for kind in KINDS if scores(needs, kind))
    return f"criterion {name} cannot score {what}, only {known}; use magnitude, gradient, taylor or brain_damage there"
