"""The walk over an exported graph: each node gets a value over axis atoms, by the rule of its operation."""

import operator
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from secateur.torch.base.manifest import named_tensors
from secateur.torch.trace.atoms import Dim, Factor, expand, fresh, give_role, leaves, mark, root, size
from secateur.torch.trace.rules import RULES, product
from secateur.torch.trace.values import UNKNOWN_EXTENT, OpCall, Record, Value, words

INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_with_inference_mode")
NUMBERS_PASS = frozenset(
    words(
        "view reshape flatten unflatten to _to_copy contiguous lift_fresh_copy clamp clamp_min clamp_max "
        "clone alias detach unsqueeze "
        "squeeze expand transpose permute slice select split int long cat sort masked_fill where index"
    )
)
COPIES = frozenset(words("lift_fresh lift_fresh_copy to clone alias detach contiguous"))
VIEWS = frozenset(
    words(
        "view reshape flatten unflatten _unsafe_view to contiguous alias detach unsqueeze squeeze expand expand_as "
        "transpose permute t swapaxes slice select narrow split chunk unbind split_with_sizes movedim diagonal view_as "
        "reshape_as numpy_T mT view_as_real view_as_complex type_as float half dropout lift_fresh"
    )
)


class Visit(NamedTuple):
    """One operation: the module that ran it, and the keys of the values it took and made."""

    module: str
    taken: tuple[int, ...]
    made: tuple[int, ...]


class Propagation:
    """Values of the nodes of one exported program, and what was noted on the way."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.record = Record()
        self.params: dict[str, Value] = {}
        self.buffers: dict[str, Value] = {}
        self.nodes: dict[fx.Node, Any] = {}
        self.outputs: list[Value] = []
        self.trail: list[Visit] = []
        self.values: dict[int, Value] = {}
        self.inputs: dict[str, Value] = {}
        self._owner: dict[int, str] = {}
        self._alias: dict[fx.Node, list[fx.Node]] = {}
        self._keys = 0
        self._tensors = named_tensors(model)
        self._modules = dict(model.named_modules())
        self._numbers: dict[str, frozenset[float]] = {}
        self._graph(program.graph_module, self._inputs(program))

    # -- inputs -------------------------------------------------------------------------------------------------------

    def _inputs(self, program: torch.export.ExportedProgram) -> list[Value | None]:
        values: list[Value | None] = []
        nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
            shape = _shapes(node)[0]
            if spec.kind == InputKind.PARAMETER:
                values.append(self._stored(spec.target, shape, self.params, zero=True))
            elif spec.kind == InputKind.BUFFER:
                values.append(self._stored(spec.target, shape, self.buffers, zero=False))
            elif shape is None:
                values.append(None)
            elif spec.kind == InputKind.USER_INPUT:
                dims = tuple(fresh(s, "an input of the model has it") for s in shape)
                self.inputs[node.name] = self._finish(Value(dims, data=True, tag="input"), node, [])
                values.append(self.inputs[node.name])
            else:
                constant = program.constants.get(spec.target) if spec.target else None
                values.append(self._finish(_constant(shape, constant), node, []))
        return values

    def _stored(self, name: str, shape: Any, table: dict[str, Value], zero: bool) -> Value:
        tensor = self._tensors.get(name)
        first = self._owner.setdefault(id(tensor), name) if tensor is not None else name
        if first not in table:
            dims = tuple(fresh(s, zero=zero) for s in shape)
            weight = first if table is self.params else None
            table[first] = Value(dims, key=self._key(), weight=weight, order=tuple(range(len(dims))))
        return table[first]

    def sources(self, key: int) -> frozenset[str]:
        """Names of the inputs of the model that a value is computed from."""
        past = (self.values[key].past if key in self.values else 0) | 1 << key
        return frozenset(name for name, value in self.inputs.items() if past >> value.key & 1)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def _graph(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        feed = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.nodes[node] = next(feed)
            elif node.op == "get_attr":
                self.nodes[node] = self._attribute(module, node)
            elif node.op == "output":
                return self._output(node, outermost=not inputs or module.graph.owning_module is not None)
            elif node.target is operator.getitem:
                self._item(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self._higher_order(module, node)
            elif isinstance(node.target, torch._ops.OpOverload):
                self._operation(node)
            else:
                self.nodes[node] = None
        return None

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        target = getattr(module, str(node.target), None)
        if not isinstance(target, torch.Tensor):
            return target
        return self._finish(_constant(tuple(target.shape), target), node, [])

    def _output(self, node: fx.Node, outermost: bool) -> Any:
        result = fx.map_arg(node.args[0], lambda n: n)
        found: list[Any] = []
        fx.map_arg(result, lambda n: found.append(self.nodes.get(n)))
        self.outputs = [v for v in found if isinstance(v, Value)]
        return found

    def _item(self, node: fx.Node) -> None:
        source = self.nodes.get(node.args[0])
        index = node.args[1]
        if isinstance(source, list) and isinstance(index, int) and index < len(source):
            self.nodes[node] = source[index]
            self._share(node, node.args[0])
        else:
            self.nodes[node] = self._opaque(node, "made by an operation that cannot be looked into")

    def _opaque(self, node: fx.Node, reason: str) -> Any:
        made = [Value(tuple(fresh(s, reason) for s in shape or ()), data=True) for shape in _shapes(node)]
        finished = [self._finish(v, node, self._values(node.all_input_nodes)) for v in made]
        return finished[0] if len(finished) == 1 else finished

    def _higher_order(self, module: fx.GraphModule, node: fx.Node) -> None:
        name = str(node.target.name()) if hasattr(node.target, "name") else str(node.target)
        if name in INLINED:
            at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            inner = self.nodes[node.args[at]]
            inputs = [self.nodes.get(a) if isinstance(a, fx.Node) else a for a in node.args[at + 1 :]]
            self.nodes[node] = self._graph(inner, inputs)
            return
        for value in self._values(node.all_input_nodes):
            for dim in value.dims:
                mark(dim, f"no rule for {name}")
        self.record.unknown[name] = self.record.unknown.get(name, 0) + 1
        self.nodes[node] = self._opaque(node, f"no rule for {name}")

    def _values(self, nodes: Iterable[fx.Node]) -> list[Value]:
        found: list[Value] = []
        for node in nodes:
            value = self.nodes.get(node)
            found += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value)]
        return found

    def _operation(self, node: fx.Node) -> None:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        schema = target._schema
        name = schema.name.split("::")[1]
        if name.startswith("_assert") or name.startswith("sym_constrain"):
            return
        plain = _plain_name(node)
        call = OpCall(plain, self._arguments(node, schema), _shapes(node), self.record, self._constants(node))
        before = self._values(node.all_input_nodes)
        result = self._apply(call, schema.name.replace("::", "."), before)
        if isinstance(result, list):
            self.nodes[node] = [self._finish(v, node, before, i) for i, v in enumerate(result)]
        else:
            self.nodes[node] = self._finish(result, node, before)
            self._pass_numbers(node, plain, before)
        made = [v for v in self._values([node]) if v.key >= 0]
        self.values.update({v.key: v for v in made})
        self.trail.append(Visit(_module(node), tuple(v.key for v in before), tuple(v.key for v in made)))
        if plain in VIEWS and node.args and isinstance(node.args[0], fx.Node):
            self._share(node, node.args[0])
        if schema.is_mutable:
            self._mutate(node, schema)

    def _constants(self, node: fx.Node) -> frozenset[float]:
        """Numbers that the modules around a node keep as attributes."""
        found: frozenset[float] = frozenset()
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            path = re.sub(r"@\d+", "", str(path))
            if path not in self._numbers:
                module = self._modules.get(path)
                values = vars(module).values() if module is not None else ()
                self._numbers[path] = frozenset(float(v) for v in values if isinstance(v, float))
            found |= self._numbers[path]
        return found

    def _arguments(self, node: fx.Node, schema: Any) -> dict[str, Any]:
        names = [a.name for a in schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        for argument in schema.arguments:
            if argument.name not in given and argument.has_default_value():
                given[argument.name] = argument.default_value
        return {name: self._argument(value) for name, value in given.items()}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.nodes.get(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return value

    def _apply(self, call: OpCall, full_name: str, before: list[Value]) -> Any:
        rule = RULES.get(call.name) if full_name.startswith(("aten.", "prims.")) else None
        reason = f"no rule for {full_name}"
        if rule is not None:
            try:
                result = rule(call)
                if _fits(result, call.shapes):
                    return result
                reason = f"the rule for {full_name} does not cover this use"
            except (AssertionError, ValueError, KeyError, IndexError, TypeError, StopIteration, AttributeError):
                reason = f"the rule for {full_name} does not cover these arguments"
        self.record.unknown[reason] = self.record.unknown.get(reason, 0) + 1
        for value in before:
            for dim in value.dims:
                mark(dim, reason)
        made = [
            Value(tuple(fresh(s, reason) for s in shape or ()), data=any(v.data for v in before))
            for shape in call.shapes
        ]
        return made if len(made) > 1 else made[0]

    def _finish(self, value: Value, node: fx.Node, before: list[Value], index: int = 0) -> Value:
        """Give a value its key, its type and its past."""
        past, behind = value.past, value.behind
        for other in before:
            past |= other.past | (1 << other.key if other.key >= 0 else 0)
            behind |= other.behind
        if _plain_name(node) in product.RULES:
            behind |= past
        key = value.key if value.key >= 0 else self._key()
        past, behind = past & ~(1 << key), behind & ~(1 << key)
        return replace(value, key=key, past=past, behind=behind, dtype=_dtype(node, index))

    def _key(self) -> int:
        self._keys += 1
        return self._keys - 1

    def _pass_numbers(self, node: fx.Node, name: str, before: list[Value]) -> None:
        """Indices stay indices of the same dimension while they are only moved."""
        value = self.nodes[node]
        domains = [v.domain for v in before if v.domain is not None]
        if name in COPIES and before and before[0].numbers:
            self.nodes[node] = value = replace(value, numbers=before[0].numbers)
        if name in NUMBERS_PASS and value.domain is None and domains and value.dtype == "int":
            self.nodes[node] = replace(value, domain=domains[0])

    # -- writing in place ---------------------------------------------------------------------------------------------

    def _share(self, node: fx.Node, source: Any) -> None:
        group = self._alias.setdefault(source, [source])
        group.append(node)
        self._alias[node] = group

    def _mutate(self, node: fx.Node, schema: Any) -> None:
        """An in-place write: what shares the memory is no longer known to be zero or constant."""
        written = [
            node.args[i]
            for i, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write and i < len(node.args)
        ]
        result = self.nodes[node]
        for target in written:
            if not isinstance(target, fx.Node) or not isinstance(result, Value):
                continue
            for other in self._alias.get(target, [target]):
                self.nodes[other] = _after_write(self.nodes.get(other), result)
            if target.op == "placeholder":
                for dim in result.dims:
                    mark(dim, "a stored tensor is rewritten in the forward pass")
            if isinstance(self.nodes[target], Value) and self.nodes[target].rank == result.rank:
                self.nodes[target] = replace(result, key=self.nodes[node].key)
            self._share(node, target)


def _constant(shape: tuple[int, ...], tensor: Any) -> Value:
    reason = "a constant of the program has it"
    numbers = None
    readable = isinstance(tensor, torch.Tensor) and not tensor.is_meta and type(tensor) is torch.Tensor
    if readable and tensor.dtype == torch.int64 and 0 < tensor.numel() <= 8:
        numbers = tuple(int(n) for n in tensor.flatten().tolist())
    return Value(tuple(fresh(s, reason) for s in shape), numbers=numbers)


def _after_write(value: Any, written: Value) -> Any:
    if not isinstance(value, Value):
        return value
    known = {id(root(leaf.atom)): leaf for dim in written.dims for leaf in leaves(dim)}
    dims: list[Dim] = []
    for dim in value.dims:
        factors = []
        for f in expand(dim):
            met = [known[id(leaf.atom)] for leaf in leaves((f,)) if id(leaf.atom) in known]
            zero = f.zero and all(m.zero for m in met)
            factors.append(Factor(f.atom, zero, f.const and all(m.const for m in met) and bool(met)))
        dims.append(tuple(factors))
    return replace(
        value,
        dims=tuple(dims),
        data=value.data or written.data,
        past=value.past | written.past,
        behind=value.behind | written.behind,
        tag=value.tag or written.tag,
        weight=None,
        order=None,
    )


def _fits(result: Any, shapes: list[tuple[int, ...] | None]) -> bool:
    values = result if isinstance(result, list) else [result]
    if len(values) != len(shapes):
        return False
    for value, shape in zip(values, shapes, strict=True):
        if shape is not None and tuple(size(expand(d)) for d in value.dims) != tuple(shape):
            return False
    return True


def _plain_name(node: fx.Node) -> str:
    """`add` for aten.add_.Tensor."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _module(node: fx.Node) -> str:
    """Path of the innermost module that ran a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+", "", str(stack[-1][0])) if stack else ""


def _extent(value: Any) -> int:
    try:
        return int(value)
    except (RuntimeError, TypeError):  # a size that depends on data
        node = getattr(value, "node", None)
        expression = node.expr if node is not None else value
        symbols = dict.fromkeys(getattr(expression, "free_symbols", ()), UNKNOWN_EXTENT)
        return int(expression.subs(symbols))


def _shapes(node: fx.Node) -> list[tuple[int, ...] | None]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [tuple(_extent(s) for s in v.shape) if isinstance(v, torch.Tensor) else None for v in values] or [None]


def _dtype(node: fx.Node, index: int) -> str:
    value = node.meta.get("val")
    value = value[index] if isinstance(value, (list, tuple)) and index < len(value) else value
    if not isinstance(value, torch.Tensor):
        return "int"
    if value.dtype == torch.bool:
        return "bool"
    return "float" if value.dtype.is_floating_point or value.dtype.is_complex else "int"


def mark_outputs(walk: Propagation) -> None:
    """Axes that reach the output of the model."""
    for value in walk.outputs:
        for dim in value.dims:
            for factor in expand(dim):
                give_role((factor,), "output")
