"""What each traced axis is (head, ffn, hidden, ...), from the operations it met, and why it may be frozen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from secateur.torch.trace.atoms import Atom, Dim, Factor, expand, frozen, give_role, inherit, leaves, mark, root
from secateur.torch.trace.values import Record, Value

NORMED_ALLOWED = ("hidden", "embedding")
ROUTED_ALLOWED = ("expert",)
TOKEN_ALLOWED = ("vocab",)
OUTPUT_ALLOWED = ("hidden", "vocab")
ANONYMOUS = "other"
UNRULED = ("no rule for", "the rule for", "internal error in the rule of")
"""The beginnings of reasons that call for a new or better rule: a weight's axis with such a reason is printed."""
_WEIGHT = {"read", "written"}
"""An axis of a weight in a product has one of these roles, or both."""
_KINDS: tuple[tuple[str, set[str], set[str]], ...] = (
    (ANONYMOUS, {"number"}, set()),
    ("head", {"head"}, _WEIGHT),
    ("group", {"group"}, set()),
    ("expert", {"expert"}, set()),
    ("mixer", {"mixer"}, _WEIGHT),
    ("hidden", {"residual", "read"}, {"written", "embedded"}),
    ("qk", {"qk"}, set()),
    ("v", {"v"}, set()),
    ("vocab", {"token"}, set()),
    ("embedding", {"embedded", "read"}, set()),
)
"""(kind, roles that the axis must have, roles of which it must have at least one); the first row that fits counts."""


@dataclass
class AxisDraft:
    """An axis before it has a name.

    atom: the axis.
    kind: what it is.
    frozen: why it cannot be pruned, or None.
    occurrences: the (parameter, dimension) of each occurrence, in order.
    """

    atom: Atom
    kind: str = ANONYMOUS
    frozen: str | None = None
    occurrences: list[tuple[str, int]] = field(default_factory=list)

    @property
    def params(self) -> list[str]:
        """Parameters that carry the axis, once each."""
        return list(dict.fromkeys(name for name, _ in self.occurrences))


def find_axes(record: Record, stored: Sequence[tuple[str, Value]], in_layer: Iterable[str]) -> list[AxisDraft]:
    """The axes of all parameters and buffers, with their kinds, in order of first occurrence.

    in_layer: paths of the module lists of like layers.
    """
    drafts: dict[int, AxisDraft] = {}
    for name, value in stored:
        for i, dim in enumerate(value.dims):
            for leaf in leaves(dim):
                drafts.setdefault(id(leaf.atom), AxisDraft(leaf.atom)).occurrences.append((name, i))
    _give_head_roles(record)
    _join_vocabulary(drafts.values())
    for dim in record.residual:
        give_role(dim, "residual")
    layers = tuple(f"{path}." for path in in_layer)
    axes = [axis for axis in drafts.values() if axis.atom.parent is None]
    for axis in axes:
        axis.kind = _kind(axis, layers)
    _mark_head_widths(axes, stored)
    for axis in axes:
        axis.frozen = _reason(axis)
    return axes


def _join_vocabulary(axes: Iterable[AxisDraft]) -> None:
    """Logits over as many tokens as the embedding has count the same tokens, tied or not."""
    tokens = [axis for axis in axes if "token" in axis.atom.roles]
    largest = max(tokens, key=lambda axis: axis.atom.size, default=None)
    if largest is None:
        return
    for axis in tokens:
        if axis is not largest:
            axis.atom.roles.discard("token")
            mark((Factor(axis.atom),), "looked up by index")
    for axis in axes:
        is_logits = axis.atom.size == largest.atom.size and axis.atom.roles == {"written", "output"}
        if is_logits and axis is not largest:
            axis.atom.parent = largest.atom
            inherit(largest.atom, axis.atom)
            largest.occurrences += axis.occurrences


def _give_head_roles(record: Record) -> None:
    """Query heads are `kv` times `group` where the values are the same along the second."""
    for dim in record.mixers:
        give_role(dim, "mixer")
    for queries, values in record.heads:
        repeated = {id(root(leaf.atom)) for f in expand(values) if f.const for leaf in leaves((f,))}
        atoms = [leaf.atom for leaf in leaves(queries)]
        has_own = any(id(atom) not in repeated for atom in atoms)
        for atom in atoms:
            atom.roles.add("group" if has_own and id(atom) in repeated else "head")


def _kind(axis: AxisDraft, layers: tuple[str, ...]) -> str:
    roles = axis.atom.roles
    for kind, needed, choice in _KINDS:
        if roles >= needed and (not choice or roles & choice):
            return kind
    if roles >= _WEIGHT:
        return _kind_of_neurons(axis, layers)
    if (frozen(axis.atom) or "").startswith(UNRULED) and roles & _WEIGHT:
        return "unknown"
    return ANONYMOUS


def _kind_of_neurons(axis: AxisDraft, layers: tuple[str, ...]) -> str:
    """The kind of an axis that one weight writes and another reads."""
    if "activated" not in axis.atom.roles:
        return "rank"
    return "ffn" if any(name.startswith(layers) for name in axis.params) else "dense"


def _mark_head_widths(axes: Iterable[AxisDraft], stored: Iterable[tuple[str, Value]]) -> None:
    """An axis that stands in one dimension with the heads of an attention or mixer is their width, not neurons."""
    by_atom = {id(axis.atom): axis for axis in axes}
    for sequence in _stored_sequences(stored):
        members = [by_atom[id(atom)] for atom in sequence if id(atom) in by_atom]
        if any(axis.kind in ("head", "group", "mixer") for axis in members):
            for axis in members:
                if axis.kind in ("ffn", "dense", "rank"):
                    axis.kind = "v"


def _reason(axis: AxisDraft) -> str | None:
    marks, kind = axis.atom.marks, axis.kind
    if reason := frozen(axis.atom):
        return reason
    for how, allowed in (("normed", NORMED_ALLOWED), ("routed", ROUTED_ALLOWED), ("token", TOKEN_ALLOWED)):
        if how in marks and kind not in allowed:
            return marks[how]
    if "scaled" in marks and kind == "qk":
        return marks["scaled"]
    if "output" in axis.atom.roles and kind not in OUTPUT_ALLOWED:
        return "the model returns it"
    if kind == ANONYMOUS:
        return "no operation says what it is"
    return None


def composites(axes: Sequence[AxisDraft], stored: Iterable[tuple[str, Value]]) -> list[tuple[AxisDraft, AxisDraft]]:
    """Pairs (kv, group) that stand side by side in a parameter: together they are the query heads."""
    by_atom = {id(axis.atom): axis for axis in axes}
    pairs: dict[tuple[int, int], tuple[AxisDraft, AxisDraft]] = {}
    for sequence in _stored_sequences(stored):
        for outer, inner in pairwise(sequence):
            first, second = by_atom.get(id(outer)), by_atom.get(id(inner))
            if first and second and first.kind in ("head", "kv") and second.kind == "group":
                pairs[id(outer), id(inner)] = (first, second)
    for first, _ in pairs.values():
        first.kind = "kv"
    paired = {id(second.atom) for _, second in pairs.values()}
    for axis in axes:
        if axis.kind == "group" and id(axis.atom) not in paired:
            axis.kind = "head"
    return list(pairs.values())


def _stored_sequences(stored: Iterable[tuple[str, Value]]) -> list[list[Atom]]:
    return [sequence for _, value in stored for dim in value.dims for sequence in _sequences(dim)]


def _sequences(dim: Dim) -> list[list[Atom]]:
    """Products of atoms inside a dimension; the terms of sums follow by themselves."""
    factors = expand(dim)
    sequences = [[f.atom for f in factors]]
    for factor in factors:
        if factor.atom.form == "sum":
            for term in factor.atom.parts:
                sequences += _sequences(term)
    return sequences
