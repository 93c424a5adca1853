"""The layout of any PyTorch Transformer, derived: export the model, walk the graph, name the axes."""

from typing import Any

from torch import nn

from secateur.dims import Dim, Factor, Term
from secateur.errors import ModelError
from secateur.layout import Axis, Layout, Linear, Product
from secateur.torch.trace import atoms
from secateur.torch.trace.axis_kinds import AxisDraft, composites, find_axes
from secateur.torch.trace.export import Example, export
from secateur.torch.trace.layer_stacks import layer_axes
from secateur.torch.trace.naming import group_lists, head_name, name_axes
from secateur.torch.trace.propagate import Propagation, mark_outputs
from secateur.torch.trace.values import Contraction, Value


def trace(model: nn.Module, example: Example, *, strict: bool = False) -> Layout:
    """The layout of a model: the axes of every parameter, coupled as the forward pass on `example` couples them.

    example: keyword arguments of the forward pass, or a tuple of positional ones. No weight is read or copied, so
    models on the meta device will do; the model comes back as it was. With `strict`, an operation without a rule
    raises instead of freezing the axes that touch it.

    Raises ModelError when torch.export cannot export the model, and for what `strict` refuses.
    """
    program = export(model, example)
    walk = Propagation(program, model)
    if strict and walk.record.unknown:
        raise ModelError(
            f"operations without a rule: {'; '.join(walk.record.unknown)}; leave strict out to freeze them"
        )
    mark_outputs(walk)
    return _Assembly(model, walk, program).layout()


def blank(model: nn.Module) -> Layout:
    """A layout without axes, to be completed by hand: each parameter with its sizes, and what linear modules read."""
    params = {name: tuple(((size,),) for size in p.shape) for name, p in model.named_parameters()}
    linears = {f"{path}.weight".lstrip("."): m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    reads = {name: Linear(f"x{i}", 1) for i, name in enumerate(linears) if name in params}
    products = tuple(Product(name, 1, params[name]) for name in reads)
    first = {id(p): name for name, p in model.named_parameters()}
    tied = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if first[id(p)] != n}
    return Layout({}, params, reads, products, tied)


class _Assembly:
    """Turns a walk into a Layout."""

    def __init__(self, model: nn.Module, walk: Propagation, program: Any) -> None:
        self.model, self.walk = model, walk
        self.lists = group_lists(_module_lists(model))
        tensors = dict(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            first.setdefault(id(tensor), name)
        for tensor_name in walk.params:
            first[id(tensors[tensor_name])] = tensor_name
        self.tied = {n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n}
        self.params: list[tuple[str, Value]] = []
        for name, tensor in tensors.items():
            if name in self.tied:
                continue
            reason = "the forward pass does not use it"
            unused = Value(tuple(atoms.fresh(s, reason) for s in tensor.shape))
            self.params.append((name, walk.params.get(name, unused)))
        self.buffers = list(walk.buffers.items())

    def layout(self) -> Layout:
        """The finished layout, checked against the shapes of the model."""
        stored = self.params + self.buffers
        found = find_axes(self.walk.record, stored, self.lists)
        pairs = composites(found, stored)
        self.names = name_axes(found, self.lists)
        axes: dict[str, Axis] = {}
        for item in found:
            if id(item.atom) in self.names:
                axes[self.names[id(item.atom)]] = self._axis(item)
                for outer, inner in pairs:
                    if inner is item:
                        self._head(axes, outer, inner)
        params = {name: self._dims(value.dims) for name, value in self.params}
        for name, value in self.buffers:
            dims = self._dims(value.dims)
            if any(not _is_literal(d) for d in dims):
                params[name] = dims
        for axis in layer_axes(self.walk, _module_lists(self.model)):
            axes[axis.name] = axis
        used = {a for a in axes if axes[a].parts or axes[a].path} | {
            n for dims in params.values() for d in dims for n in _names(d)
        }
        axes = {name: axis for name, axis in axes.items() if name in used}
        linears, products = self._products()
        layout = Layout(axes, params, linears, products, self.tied)
        shapes = {n: tuple(t.shape) for n, t in (*self.model.named_parameters(), *self.model.named_buffers())}
        layout.check(shapes)
        return layout

    def _axis(self, found: AxisDraft) -> Axis:
        return Axis(self.names[id(found.atom)], found.atom.size, found.kind, found.frozen)

    def _head(self, axes: dict[str, Axis], outer: AxisDraft, inner: AxisDraft) -> None:
        kv, group = self.names[id(outer.atom)], self.names[id(inner.atom)]
        name = head_name(kv)
        frozen = outer.frozen or inner.frozen
        axes[name] = Axis(name, outer.atom.size * inner.atom.size, "head", frozen, (kv, group))

    def _dims(self, dims: tuple[atoms.Dim, ...]) -> tuple[Dim, ...]:
        return tuple(self._dim(d) for d in dims)

    def _dim(self, dim: atoms.Dim) -> Dim:
        term: list[Factor] = []
        for factor in atoms.expand(dim):
            part = self._factor(factor.atom)
            if isinstance(part, int) and term and isinstance(term[-1], int):
                term[-1] = term[-1] * part
            else:
                term.append(part)
        if len(term) == 1 and isinstance(term[0], tuple):
            return term[0]
        return (tuple(term) or (1,),)

    def _factor(self, atom: atoms.Atom) -> Factor:
        if atom.form == "plain":
            return self.names.get(id(atom), atom.size)
        terms: list[Term] = []
        for part in atom.parts:
            terms += self._dim(part)
        merged: list[Term] = []
        for term in terms:
            if merged and _is_literal((term,)) and _is_literal((merged[-1],)):
                merged[-1] = (int(merged[-1][0]) + int(term[0]),)  # type: ignore[arg-type]
            else:
                merged.append(term)
        return int(merged[0][0]) if len(merged) == 1 and _is_literal((merged[0],)) else tuple(merged)  # type: ignore[arg-type]

    def _products(self) -> tuple[dict[str, Linear], tuple[Product, ...]]:
        linears: dict[str, Linear] = {}
        numbers: dict[int, str] = {}
        products = []
        for item in self.walk.record.contractions:
            if item.weight is not None and item.in_dim is not None:
                reads = numbers.setdefault(item.reads, f"x{len(numbers)}")
                inputs = self.walk.sources(item.reads)
                linears.setdefault(item.weight, Linear(reads, item.in_dim, inputs=inputs))
            products.append(self._product(item))
        return linears, tuple(products)

    def _product(self, item: Contraction) -> Product:
        """Named dimensions stay dimensions; what no axis describes is multiplied into the calls."""
        calls, dims = 1, []
        for dim in item.dims:
            rendered = self._dim(dim)
            if _is_literal(rendered):
                calls *= int(rendered[0][0])  # type: ignore[arg-type]
            else:
                dims.append(rendered)
        return Product(item.weight, calls, tuple(dims))


def _is_literal(dim: Dim) -> bool:
    return len(dim) == 1 and len(dim[0]) == 1 and isinstance(dim[0][0], int)


def _names(dim: Dim) -> set[str]:
    found: set[str] = set()
    for term in dim:
        for factor in term:
            if isinstance(factor, str):
                found.add(factor)
            elif isinstance(factor, tuple):
                found |= _names(factor)
    return found


def _module_lists(model: nn.Module) -> dict[str, list[str]]:
    """Module lists and the types of their elements."""
    return {
        path: [type(child).__name__ for child in module]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
