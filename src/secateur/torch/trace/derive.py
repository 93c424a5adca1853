"""The layout of any PyTorch Transformer, derived: export the model, propagate axes through the graph, name them."""

from collections.abc import Mapping

from torch import nn

from secateur.dims import Dim, Factor, Term
from secateur.dims import names as axis_names
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
    propagation = Propagation(export(model, example), model)
    unknown = propagation.record.unknown
    if strict and unknown:
        raise ModelError(f"operations without a rule: {'; '.join(unknown)}; leave strict out to freeze them")
    mark_outputs(propagation)
    return _Assembly(model, propagation).layout()


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
    """Makes a Layout of what was propagated.

    tied: name of a parameter -> name of the same parameter that the layout describes.
    params, buffers: the stored tensors by name; dimensions that the forward pass does not use are frozen.
    drafts: the axes of the stored tensors.
    names: identity of an atom -> name of its axis.
    """

    def __init__(self, model: nn.Module, propagation: Propagation) -> None:
        self.model, self.propagation = model, propagation
        tensors = dict(model.named_parameters(remove_duplicate=False))
        self.tied = _tied(tensors, propagation.params)
        self.params: list[tuple[str, Value]] = []
        for name, tensor in tensors.items():
            if name not in self.tied:
                reason = "the forward pass does not use it"
                unused = Value(tuple(atoms.fresh(extent, reason) for extent in tensor.shape))
                self.params.append((name, propagation.params.get(name, unused)))
        self.buffers = list(propagation.buffers.items())
        lists = group_lists(_module_lists(model))
        stored = self.params + self.buffers
        self.drafts = find_axes(propagation.record, stored, lists)
        self.pairs = composites(self.drafts, stored)
        self.names = name_axes(self.drafts, lists)

    def layout(self) -> Layout:
        """The finished layout, checked against the shapes of the model."""
        params = {name: self._dims(value.dims) for name, value in self.params}
        for name, value in self.buffers:
            dims = self._dims(value.dims)
            if any(_literal(dim) is None for dim in dims):
                params[name] = dims
        used = {name for dims in params.values() for dim in dims for name in axis_names(dim)}
        axes = {axis.name: axis for axis in self._axes() if axis.name in used or axis.parts or axis.path}
        linears, products = self._products()
        layout = Layout(axes, params, linears, products, self.tied)
        layout.check({n: tuple(t.shape) for n, t in (*self.model.named_parameters(), *self.model.named_buffers())})
        return layout

    def _axes(self) -> list[Axis]:
        """The axes of the stored tensors, query heads made of two of them, and layers."""
        axes: list[Axis] = []
        for draft in self.drafts:
            if id(draft.atom) in self.names:
                axes.append(Axis(self.names[id(draft.atom)], draft.atom.size, draft.kind, draft.frozen))
                axes += [self._query_heads(kv, group) for kv, group in self.pairs if group is draft]
        return axes + layer_axes(self.propagation, _module_lists(self.model))

    def _query_heads(self, kv: AxisDraft, group: AxisDraft) -> Axis:
        parts = (self.names[id(kv.atom)], self.names[id(group.atom)])
        return Axis(head_name(parts[0]), kv.atom.size * group.atom.size, "head", kv.frozen or group.frozen, parts)

    def _dims(self, dims: tuple[atoms.Dim, ...]) -> tuple[Dim, ...]:
        return tuple(self._dim(dim) for dim in dims)

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
        merged: list[Term] = []
        for term in (term for part in atom.parts for term in self._dim(part)):
            number, last = _literal((term,)), _literal(tuple(merged[-1:]))
            if number is not None and last is not None:
                merged[-1] = (last + number,)
            else:
                merged.append(term)
        whole = _literal(tuple(merged))
        return tuple(merged) if whole is None else whole

    def _products(self) -> tuple[dict[str, Linear], tuple[Product, ...]]:
        linears: dict[str, Linear] = {}
        numbers: dict[int, str] = {}
        products = []
        for contraction in self.propagation.record.contractions:
            if contraction.weight is not None and contraction.in_dim is not None:
                reads = numbers.setdefault(contraction.reads, f"x{len(numbers)}")
                inputs = self.propagation.sources(contraction.reads)
                linears.setdefault(contraction.weight, Linear(reads, contraction.in_dim, inputs=inputs))
            products.append(self._product(contraction))
        return linears, tuple(products)

    def _product(self, contraction: Contraction) -> Product:
        """Named dimensions stay dimensions; the sizes of all others are multiplied into the calls."""
        calls, dims = 1, []
        for dim in self._dims(tuple(contraction.dims)):
            number = _literal(dim)
            if number is None:
                dims.append(dim)
            else:
                calls *= number
        return Product(contraction.weight, calls, tuple(dims))


def _tied(tensors: Mapping[str, nn.Parameter], described: Mapping[str, Value]) -> dict[str, str]:
    """Names of parameters that have another name too -> the name under which they are described."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    for name in described:
        names[id(tensors[name])] = name
    return {name: names[id(tensor)] for name, tensor in tensors.items() if names[id(tensor)] != name}


def _literal(dim: Dim) -> int | None:
    """The size of a dimension that is one number; None for dimensions with named axes."""
    if len(dim) == 1 and len(dim[0]) == 1 and isinstance(dim[0][0], int):
        return dim[0][0]
    return None


def _module_lists(model: nn.Module) -> dict[str, list[str]]:
    """Module lists and the types of their elements."""
    return {
        path: [type(child).__name__ for child in module]
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
