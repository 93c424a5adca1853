"""Union-find over axis atoms: what the dimensions of a traced graph have in common.

A dimension is a tuple of factors, outermost first. A factor is an atom plus what is known of the tensor along it.
An atom is plain, or was refined into a product (by a view) or into a sum (by a split or a concatenation).
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeAlias


class Atom:
    """An indivisible axis, until an operation refines it.

    size: number of positions.
    parent: the atom that this one was united with, or None.
    form: `plain`, `product` (of `parts`, outermost first) or `sum` (of `parts`, one after the other).
    marks: what speaks against pruning it: how (`frozen` for good; `normed`, `routed`, `token` or `scaled` for all but
        some kinds) -> why, in words.
    roles: what operations did with it (`head`, `qk`, `v`, ...).
    """

    __slots__ = ("form", "marks", "parent", "parts", "roles", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Atom | None = None
        self.form = "plain"
        self.parts: tuple[Dim, ...] = ()
        self.marks: dict[str, str] = {}
        self.roles: set[str] = set()


class Factor(NamedTuple):
    """An atom inside one dimension of one tensor.

    zero: the tensor is zero wherever a unit of the atom is masked.
    const: the tensor is the same at every unit.
    """

    atom: Atom
    zero: bool = False
    const: bool = False


Dim: TypeAlias = tuple[Factor, ...]


def root(atom: Atom) -> Atom:
    """The atom that stands for everything united with this one."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def expand(dim: Dim) -> list[Factor]:
    """The factors of a dimension with products multiplied out; factors of size 1 vanish."""
    result: list[Factor] = []
    for factor in dim:
        atom = root(factor.atom)
        if atom.size == 1:
            continue
        if atom.form == "product":
            for part in atom.parts:
                result += [Factor(f.atom, factor.zero, factor.const) for f in expand(part)]
        else:
            result.append(Factor(atom, factor.zero, factor.const))
    return result


def size(dim: Sequence[Factor]) -> int:
    """Number of positions along a dimension."""
    return prod(f.atom.size for f in dim)


def fresh(extent: int, reason: str | None = None, *, zero: bool = False, const: bool = False) -> Dim:
    """A new dimension of one plain atom; with a reason, a frozen one."""
    atom = Atom(extent)
    if reason is not None:
        atom.marks["frozen"] = reason
    return (Factor(atom, zero, const),)


def leaves(dim: Sequence[Factor]) -> Iterator[Factor]:
    """Every plain factor of a dimension; the terms of a sum are opened too."""
    for factor in expand(tuple(dim)):
        if factor.atom.form == "sum":
            for term in factor.atom.parts:
                for leaf in leaves(term):
                    yield Factor(leaf.atom, factor.zero, factor.const)
        else:
            yield factor


def mark(dim: Sequence[Factor], reason: str, how: str = "frozen") -> None:
    """Record what speaks against pruning the axes of a dimension; the first reason is kept."""
    for leaf in leaves(dim):
        leaf.atom.marks.setdefault(how, reason)


def number(dim: Sequence[Factor], reason: str) -> None:
    """Freeze axes that only count parts (of a fused weight, of a rotary pair): layouts print them as numbers."""
    mark(dim, reason)
    give_role(dim, "number")


def give_role(dim: Sequence[Factor], role: str) -> None:
    """Record what an operation did with the axes of a dimension."""
    for leaf in leaves(dim):
        leaf.atom.roles.add(role)


def frozen(atom: Atom) -> str | None:
    """Why a plain atom cannot be pruned as any kind of axis, or None."""
    return root(atom).marks.get("frozen")


def same_axes(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are products of the same atoms in the same order."""
    return [f.atom for f in expand(a)] == [f.atom for f in expand(b)]


def is_frozen(dim: Sequence[Factor]) -> bool:
    """Whether every axis of a dimension is frozen for good (positions, batch, constants)."""
    return all(frozen(leaf.atom) is not None for leaf in leaves(dim))


def first_reason(dim: Sequence[Factor], default: str) -> str:
    """The reason of the first frozen axis in a dimension."""
    return next((why for leaf in leaves(dim) if (why := frozen(leaf.atom))), default)


# -- refining ---------------------------------------------------------------------------------------------------------


def _refine(atom: Atom, form: str, parts: tuple[Dim, ...]) -> None:
    for part in parts:
        for leaf in leaves(part):
            inherit(leaf.atom, atom)
    atom.form, atom.parts = form, parts


def inherit(heir: Atom, atom: Atom) -> None:
    """Add the marks and roles of an atom to those of another, which keeps its own reasons."""
    for how, why in atom.marks.items():
        heir.marks.setdefault(how, why)
    heir.roles |= atom.roles


def peel(atom: Atom, outer: int) -> bool:
    """Refine an atom into a product whose first part has the size `outer` (or less, if the atom is a sum of equals)."""
    atom = root(atom)
    if outer == 0:
        return False
    if atom.form == "plain" and atom.size % outer == 0:
        _refine(atom, "product", (fresh(outer), fresh(atom.size // outer)))
        return True
    return _sum_to_product(atom)


def _sum_to_product(atom: Atom) -> bool:
    """Make a sum of n terms of one size the product n x term; the terms are united."""
    terms = atom.parts
    if atom.form != "sum" or len({size(t) for t in terms}) != 1:
        return False
    unite(terms)
    count = fresh(len(terms))
    number(count, "numbers the parts of a fused weight")
    atom.form, atom.parts = "product", (count, terms[0])
    return True


def add_up(terms: Sequence[Dim]) -> Dim:
    """The dimension of a concatenation: a sum of terms, or n x term when all terms are the same axes."""
    opened = [expand(term) for term in terms]
    zero = all(f.zero for term in opened for f in term)
    if not any(opened):
        return _count(len(terms), zero=zero)
    if all(is_frozen(term) for term in opened):
        return fresh(sum(size(term) for term in opened), first_reason(opened[0], "concatenated positions"), zero=zero)
    if len(terms) > 1 and all(same_axes(terms[0], term) for term in terms):
        return _count(len(terms), zero=zero) + tuple(Factor(f.atom, zero) for f in opened[0])
    atom = Atom(sum(size(term) for term in opened))
    atom.form = "sum"
    atom.parts = tuple(part for term in opened for part in _parts_of_sum(term))
    return (Factor(atom, zero),)


def _count(parts: int, *, zero: bool) -> Dim:
    dim = fresh(parts, zero=zero)
    number(dim, "numbers equal parts")
    return dim


def _parts_of_sum(term: Sequence[Factor]) -> list[Dim]:
    if len(term) == 1 and term[0].atom.form == "sum":
        return [tuple(expand(part)) for part in term[0].atom.parts]
    return [tuple(term)]


def narrow(dim: Dim, start: int, length: int) -> Dim:
    """The positions start .. start + length of a dimension; its axes are refined where the range cuts them."""
    factors = expand(dim)
    if length == size(factors):
        return dim
    if length <= 0 or not factors:
        return fresh(max(length, 0), "empty slice")
    head, rest = factors[0], tuple(factors[1:])
    inner = size(rest)
    if start % inner == 0 and length % inner == 0:
        return _piece(head, start // inner, length // inner) + rest
    if start // inner == (start + length - 1) // inner:
        mark((head,), "single positions are taken from it")
        return narrow(rest, start % inner, length)
    mark(factors, "sliced across the bounds of its units")
    return fresh(length, "sliced across the bounds of its units")


def _piece(factor: Factor, start: int, length: int) -> Dim:
    atom = root(factor.atom)
    if length == atom.size:
        return (factor,)
    if atom.form == "plain":
        if why := frozen(atom):
            return fresh(length, why, zero=factor.zero, const=factor.const)
        if length == 1 and atom.size <= 4:
            mark((factor,), "single positions are taken from it")
            return ()
        sizes = [s for s in (start, length, atom.size - start - length) if s > 0]
        _refine(atom, "sum", tuple(fresh(s) for s in sizes))
    taken = _terms(factor, start, length)
    if sum(size(t) for t in taken) != length:
        mark((factor,), "sliced across the bounds of its units")
        return fresh(length, "sliced across the bounds of its units")
    return taken[0] if len(taken) == 1 else add_up(taken)


def _terms(factor: Factor, start: int, length: int) -> list[Dim]:
    """The terms of a sum that begin inside a range, after the sum was cut at the ends of the range."""
    atom = root(factor.atom)
    _cut(atom, start)
    _cut(atom, start + length)
    position, taken = 0, []
    for term in atom.parts:
        if start <= position < start + length:
            taken.append(tuple(Factor(f.atom, factor.zero, factor.const) for f in term))
        position += size(term)
    return taken


def _cut(atom: Atom, offset: int) -> None:
    """Make `offset` a boundary between two terms of a sum, where the axes allow it."""
    position = 0
    for i, term in enumerate(atom.parts):
        extent = size(term)
        if position < offset < position + extent:
            first = narrow(term, 0, offset - position)
            second = narrow(term, offset - position, extent - (offset - position))
            atom.parts = (*atom.parts[:i], first, second, *atom.parts[i + 1 :])
            return
        position += extent


# -- uniting ----------------------------------------------------------------------------------------------------------


def unify(a: Dim, b: Dim, reason: str = "incommensurate axes meet") -> bool:
    """Make two dimensions the same axes; where that is impossible, freeze what remains of both and return False."""
    left, right = expand(a), expand(b)
    while left and right:
        x, y = left[0].atom, right[0].atom
        if x is y:
            left, right = left[1:], right[1:]
        elif x.size == y.size:
            if not _join(x, y):
                break
            left, right = expand(tuple(left[1:])), expand(tuple(right[1:]))
        else:
            big, small = (x, y) if x.size > y.size else (y, x)
            if not peel(big, small.size):
                break
            left, right = expand(tuple(left)), expand(tuple(right))
    if left or right:
        mark(left + right, reason)
    return not left and not right


def unite(dims: Sequence[Dim]) -> bool:
    """Unify the first dimension with each other one; whether all of that was possible."""
    united = [unify(dims[0], dim) for dim in dims[1:]]
    return all(united)


def _join(x: Atom, y: Atom) -> bool:
    """Unite two atoms of one size (neither is a product)."""
    if x.form == "plain":
        x, y = y, x
    if y.form == "plain":
        y.parent = x
        for leaf in leaves((Factor(x),)):
            inherit(leaf.atom, y)
        return True
    return _join_sums(x, y)


def _join_sums(x: Atom, y: Atom) -> bool:
    for first, second in ((x, y), (y, x)):
        position = 0
        for term in tuple(second.parts):
            position += size(term)
            _cut(first, position)
    if [size(t) for t in x.parts] != [size(t) for t in y.parts]:
        return False
    united = [unify(p, q) for p, q in zip(x.parts, y.parts, strict=True)]
    y.parent = x
    return all(united)


# -- regrouping -------------------------------------------------------------------------------------------------------


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dimensions of a view: the same factors in the same order, grouped to the sizes that the view has.

    Factors that cannot be grouped freeze; the dimensions before and after them stay as they are.
    """
    queue = [f for dim in dims for f in expand(dim)]
    front, queue = _take_from_left(queue, sizes)
    rest = list(sizes[len(front) :])
    if not rest:
        return front
    back, queue = _take_from_right(queue, rest)
    middle = rest[: len(rest) - len(back)]
    reason = "a view regroups it across the bounds of its units"
    mark(queue, reason)
    return front + [fresh(s, first_reason(queue, reason)) for s in middle] + back


def _take_from_left(queue: list[Factor], sizes: Sequence[int]) -> tuple[list[Dim], list[Factor]]:
    done: list[Dim] = []
    for extent in sizes:
        taken: list[Factor] = []
        need, rest = extent, queue
        while need > 1 and rest:
            head = rest[0]
            if need % head.atom.size == 0:
                taken.append(head)
                need //= head.atom.size
                rest = rest[1:]
            elif head.atom.size % need or not peel(head.atom, need):
                break
            else:
                rest = expand(tuple(rest))
        if need > 1:
            break
        done.append(tuple(taken))
        queue = rest
    return done, expand(tuple(queue))


def _take_from_right(queue: list[Factor], sizes: Sequence[int]) -> tuple[list[Dim], list[Factor]]:
    done: list[Dim] = []
    for extent in reversed(sizes):
        taken: list[Factor] = []
        need, rest = extent, queue
        while need > 1 and rest:
            tail = rest[-1]
            if need % tail.atom.size == 0:
                taken.insert(0, tail)
                need //= tail.atom.size
                rest = rest[:-1]
            elif tail.atom.size % need or tail.atom.form != "plain" or not peel(tail.atom, tail.atom.size // need):
                break
            else:
                rest = expand(tuple(rest))
        if need > 1 or len(done) == len(sizes) - 1:
            break
        done.insert(0, tuple(taken))
        queue = rest
    return done, expand(tuple(queue))
