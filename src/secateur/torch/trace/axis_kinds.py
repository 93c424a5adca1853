"""What each traced axis is (head, ffn, hidden, ...), from the operations it met, and why it may be frozen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from secateur.torch.trace.atoms import Atom, Dim, Factor, expand, frozen, leaves, mark, root
from secateur.torch.trace.values import Record, Value

NORMED_ALLOWED = ("hidden", "embedding")
ROUTED_ALLOWED = ("expert",)
TOKEN_ALLOWED = ("vocab",)
OUTPUT_ALLOWED = ("hidden", "vocab")
ANONYMOUS = "other"
UNRULED = ("no rule for", "the rule for")
"""How the reasons begin that are worth an axis of their own in print: a rule could be written."""


@dataclass
class AxisDraft:
    """An axis on its way to a name: where it occurs, what it is, and why it is frozen."""

    atom: Atom
    kind: str = ANONYMOUS
    frozen: str | None = None
    places: list[tuple[str, int]] = field(default_factory=list)
    """(parameter, dimension) of each occurrence, in order."""

    @property
    def params(self) -> list[str]:
        """Parameters that carry it, once each."""
        return list(dict.fromkeys(name for name, _ in self.places))


def find_axes(record: Record, stored: Sequence[tuple[str, Value]], in_layer: Iterable[str]) -> list[AxisDraft]:
    """The axes of all parameters and buffers, classified, in order of first occurrence."""
    found: dict[int, AxisDraft] = {}
    for name, value in stored:
        for i, dim in enumerate(value.dims):
            for leaf in leaves(dim):
                found.setdefault(id(leaf.atom), AxisDraft(leaf.atom)).places.append((name, i))
    _head_roles(record)
    _join_vocabulary(found.values())
    for dim in record.residual:
        for leaf in leaves(dim):
            leaf.atom.roles.add("residual")
    layered = tuple(f"{path}." for path in in_layer)
    found = {key: axis for key, axis in found.items() if axis.atom.parent is None}
    for axis in found.values():
        axis.kind = _kind(axis, layered)
    _inside_heads(found.values(), stored)
    for axis in found.values():
        axis.frozen = _reason(axis)
    return list(found.values())


def _join_vocabulary(axes: Iterable[AxisDraft]) -> None:
    """Logits over as many tokens as the embedding has count the same tokens, tied or not."""
    tokens = [a for a in axes if "token" in a.atom.roles]
    largest = max(tokens, key=lambda a: a.atom.size, default=None)
    for axis in tokens:
        if axis is not largest:
            axis.atom.roles.discard("token")
            mark((Factor(axis.atom),), "looked up by index")
    for axis in list(axes):
        if largest is None or axis.atom.size != largest.atom.size or axis is largest:
            continue
        if axis.atom.roles == {"written", "output"}:
            axis.atom.parent = largest.atom
            largest.atom.roles |= axis.atom.roles
            for how, why in axis.atom.marks.items():
                largest.atom.marks.setdefault(how, why)
            largest.places += axis.places


def _head_roles(record: Record) -> None:
    """Query heads are `kv` times `group` where the values are the same along the second."""
    for dim in record.mixers:
        for leaf in leaves(dim):
            leaf.atom.roles.add("mixer")
    for queries, values in record.heads:
        repeated = {id(root(leaf.atom)) for f in expand(values) if f.const for leaf in leaves((f,))}
        inside = list(leaves(queries))
        for leaf in inside:
            shared = id(leaf.atom) in repeated and any(id(o.atom) not in repeated for o in inside)
            leaf.atom.roles.add("group" if shared else "head")


def _kind(axis: AxisDraft, layered: tuple[str, ...]) -> str:
    roles = axis.atom.roles
    if "number" in roles:
        return ANONYMOUS
    if "head" in roles and roles & {"written", "read"}:
        return "head"
    if "group" in roles:
        return "group"
    if "expert" in roles:
        return "expert"
    if "mixer" in roles and roles & {"written", "read"}:
        return "mixer"
    if "residual" in roles and roles & {"written", "embedded"} and "read" in roles:
        return "hidden"
    if "qk" in roles:
        return "qk"
    if "v" in roles:
        return "v"
    if "token" in roles:
        return "vocab"
    if "embedded" in roles and "read" in roles:
        return "embedding"
    if roles >= {"written", "read"}:
        inside = any(name.startswith(layered) for name in axis.params) if layered else False
        return ("ffn" if inside else "dense") if "activated" in roles else "rank"
    if (frozen(axis.atom) or "").startswith(UNRULED) and roles & {"written", "read"}:
        return "unknown"
    return ANONYMOUS


def _inside_heads(axes: Iterable[AxisDraft], stored: Iterable[tuple[str, Value]]) -> None:
    """What stands in one product with the heads of an attention or mixer is their width, not neurons."""
    kinds = {id(a.atom): a for a in axes}
    for _, value in stored:
        for dim in value.dims:
            for sequence in _sequences(dim):
                found = [kinds[id(atom)] for atom in sequence if id(atom) in kinds]
                if any(a.kind in ("head", "group", "mixer") for a in found):
                    for axis in found:
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


def composites(axes: list[AxisDraft], stored: Iterable[tuple[str, Value]]) -> list[tuple[AxisDraft, AxisDraft]]:
    """Pairs (kv, group) that stand side by side in a parameter: together they are the query heads."""
    by_atom = {id(a.atom): a for a in axes}
    pairs: dict[tuple[int, int], tuple[AxisDraft, AxisDraft]] = {}
    for _, value in stored:
        for dim in value.dims:
            for sequence in _sequences(dim):
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


def _sequences(dim: Dim) -> list[list[Atom]]:
    """Products of atoms inside a dimension, sums opened."""
    factors = expand(dim)
    found = [[f.atom for f in factors]]
    for factor in factors:
        if factor.atom.form == "sum":
            for term in factor.atom.parts:
                found += _sequences(term)
    return found
