"""Propagation through an exported graph: each node gets a value over axis atoms, by the rule of its operation."""

import operator
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from secateur.torch.base.expected_errors import in_a_line
from secateur.torch.base.manifest import named_tensors
from secateur.torch.trace.atoms import Factor, expand, fresh, give_role, leaves, mark, root, size
from secateur.torch.trace.nodes import dtype_of, module_of, modules_of, plain_name, shapes_of
from secateur.torch.trace.rules import RULES, product
from secateur.torch.trace.values import NotCovered, OpCall, Record, Value, words

STRICT_RULES = "SECATEUR_STRICT_RULES"
"""Environment variable: with the value 1, a defect of a rule raises instead of freezing axes."""
INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_with_inference_mode")
"""Higher-order operations whose inner graph is read as if its nodes stood in the outer one."""
NUMBERS_PASS = frozenset(
    words(
        "view reshape flatten unflatten to _to_copy contiguous lift_fresh_copy clamp clamp_min clamp_max "
        "clone alias detach unsqueeze "
        "squeeze expand transpose permute slice select split int long cat sort masked_fill where index"
    )
)
"""Operations after which indices are still positions of the same dimension."""
COPIES = frozenset(words("lift_fresh lift_fresh_copy to clone alias detach contiguous"))
"""Operations that keep the entries of a tensor."""
VIEWS = frozenset(
    words(
        "view reshape flatten unflatten _unsafe_view to contiguous alias detach unsqueeze squeeze expand expand_as "
        "transpose permute t swapaxes slice select narrow split chunk unbind split_with_sizes movedim diagonal view_as "
        "reshape_as numpy_T mT view_as_real view_as_complex type_as float half dropout lift_fresh"
    )
)
"""Operations whose result may share memory with the first argument."""


class Visit(NamedTuple):
    """One operation of the graph.

    module: path of the innermost module that ran it.
    taken: keys of the values that it read.
    made: keys of the values that it made.
    """

    module: str
    taken: tuple[int, ...]
    made: tuple[int, ...]


class Propagation:
    """The values of the nodes of one exported program.

    record: what the rules noted.
    params, buffers: the values of the stored tensors, by the first name of each.
    inputs: the values of the inputs of the model, by the names of their nodes.
    outputs: the values that the model returns.
    values: the values that operations made, by key.
    trail: the operations in order.
    """

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
            shape = shapes_of(node)[0]
            if shape is None:
                values.append(None)
            elif spec.kind == InputKind.PARAMETER:
                values.append(self._stored(spec.target, shape, self.params, zero=True))
            elif spec.kind == InputKind.BUFFER:
                values.append(self._stored(spec.target, shape, self.buffers, zero=False))
            elif spec.kind == InputKind.USER_INPUT:
                dims = tuple(fresh(extent, "an input of the model has it") for extent in shape)
                self.inputs[node.name] = self._finish(Value(dims, data=True, tag="input"), node, [])
                values.append(self.inputs[node.name])
            else:
                constant = program.constants.get(spec.target) if spec.target else None
                values.append(self._finish(_constant(shape, constant), node, []))
        return values

    def _stored(self, name: str, shape: tuple[int, ...], table: dict[str, Value], *, zero: bool) -> Value:
        tensor = self._tensors.get(name)
        first = self._owner.setdefault(id(tensor), name) if tensor is not None else name
        if first not in table:
            dims = tuple(fresh(extent, zero=zero) for extent in shape)
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
                return self._output(node)
            elif node.target is operator.getitem:
                self._item(node)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self._higher_order(node)
            elif isinstance(node.target, torch._ops.OpOverload):
                self._operation(node, node.target)
            else:
                self.nodes[node] = None
        return None

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        target = getattr(module, str(node.target), None)
        if not isinstance(target, torch.Tensor):
            return target
        return self._finish(_constant(tuple(target.shape), target), node, [])

    def _output(self, node: fx.Node) -> list[Any]:
        """What a graph returns; the graph that ends last is the outermost one."""
        results: list[Any] = []
        fx.map_arg(node.args[0], lambda n: results.append(self.nodes.get(n)))
        self.outputs = [result for result in results if isinstance(result, Value)]
        return results

    def _item(self, node: fx.Node) -> None:
        owner, index = node.args
        results = self.nodes.get(owner) if isinstance(owner, fx.Node) else None
        if isinstance(owner, fx.Node) and isinstance(results, list) and isinstance(index, int) and index < len(results):
            self.nodes[node] = results[index]
            self._share(node, owner)
        else:
            self.nodes[node] = self._opaque(node, "made by an operation that cannot be looked into")

    def _opaque(self, node: fx.Node, reason: str) -> Any:
        made = [Value(tuple(fresh(extent, reason) for extent in shape or ()), data=True) for shape in shapes_of(node)]
        finished = [self._finish(v, node, self._values(node.all_input_nodes)) for v in made]
        return finished[0] if len(finished) == 1 else finished

    def _higher_order(self, node: fx.Node) -> None:
        name = str(node.target.name()) if hasattr(node.target, "name") else str(node.target)
        if name in INLINED:
            arguments: list[Any] = [self.nodes.get(a) if isinstance(a, fx.Node) else a for a in node.args]
            at = next(i for i, a in enumerate(arguments) if isinstance(a, fx.GraphModule))
            self.nodes[node] = self._graph(arguments[at], arguments[at + 1 :])
            return
        for value in self._values(node.all_input_nodes):
            for dim in value.dims:
                mark(dim, f"no rule for {name}")
        self.record.unknown[name] = self.record.unknown.get(name, 0) + 1
        self.nodes[node] = self._opaque(node, f"no rule for {name}")

    def _values(self, nodes: Iterable[fx.Node]) -> list[Value]:
        values: list[Value] = []
        for node in nodes:
            value = self.nodes.get(node)
            values += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Value)]
        return values

    def _operation(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        schema = target._schema
        if schema.name.split("::")[1].startswith(("_assert", "sym_constrain")):
            return
        plain = plain_name(node)
        call = OpCall(plain, self._arguments(node, schema), shapes_of(node), self.record, self._constants(node))
        before = self._values(node.all_input_nodes)
        result = self._apply(call, schema.name.replace("::", "."), before)
        if isinstance(result, list):
            self.nodes[node] = [self._finish(v, node, before, i) for i, v in enumerate(result)]
        else:
            self.nodes[node] = self._finish(result, node, before)
            self._pass_numbers(node, plain, before)
        made = [v for v in self._values([node]) if v.key >= 0]
        self.values.update({v.key: v for v in made})
        self.trail.append(Visit(module_of(node), tuple(v.key for v in before), tuple(v.key for v in made)))
        if plain in VIEWS and node.args and isinstance(node.args[0], fx.Node):
            self._share(node, node.args[0])
        if schema.is_mutable:
            self._mutate(node, schema)

    def _constants(self, node: fx.Node) -> frozenset[float]:
        """Numbers that the modules around a node keep as attributes."""
        numbers: frozenset[float] = frozenset()
        for path in modules_of(node):
            if path not in self._numbers:
                module = self._modules.get(path)
                values = vars(module).values() if module is not None else ()
                self._numbers[path] = frozenset(float(v) for v in values if isinstance(v, float))
            numbers |= self._numbers[path]
        return numbers

    def _arguments(self, node: fx.Node, schema: Any) -> dict[str, Any]:
        names = [a.name for a in schema.arguments]
        arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        for argument in schema.arguments:
            if argument.name not in arguments and argument.has_default_value():
                arguments[argument.name] = argument.default_value
        return {name: self._argument(value) for name, value in arguments.items()}

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.nodes.get(value)
        if isinstance(value, (list, tuple)):
            return [self._argument(v) for v in value]
        return value

    def _apply(self, call: OpCall, full_name: str, before: list[Value]) -> Value | list[Value]:
        """The result of an operation by its rule; frozen, with all arguments, where no rule covers the operation."""
        result = _by_rule(call, full_name)
        if not isinstance(result, _Uncovered):
            return result
        reason = result.reason
        self.record.unknown[reason] = self.record.unknown.get(reason, 0) + 1
        for value in before:
            for dim in value.dims:
                mark(dim, reason)
        data = any(v.data for v in before)
        made = [Value(tuple(fresh(extent, reason) for extent in shape or ()), data=data) for shape in call.shapes]
        return made if len(made) > 1 else made[0]

    def _finish(self, value: Value, node: fx.Node, before: list[Value], index: int = 0) -> Value:
        """Give a value its key, its type and its past."""
        past, behind = value.past, value.behind
        for operand in before:
            past |= operand.past | (1 << operand.key if operand.key >= 0 else 0)
            behind |= operand.behind
        if plain_name(node) in product.RULES:
            behind |= past
        key = value.key if value.key >= 0 else self._key()
        past, behind = past & ~(1 << key), behind & ~(1 << key)
        return replace(value, key=key, past=past, behind=behind, dtype=dtype_of(node, index))

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

    def _share(self, node: fx.Node, source: fx.Node) -> None:
        group = self._alias.setdefault(source, [source])
        group.append(node)
        self._alias[node] = group

    def _mutate(self, node: fx.Node, schema: Any) -> None:
        """An in-place write: tensors that share the memory are zero or constant only where the written one is."""
        result = self.nodes[node]
        if not isinstance(result, Value):
            return
        for target, argument in zip(node.args, schema.arguments, strict=False):
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(target, fx.Node):
                continue
            for sharer in self._alias.get(target, [target]):
                value = self.nodes.get(sharer)
                if isinstance(value, Value):
                    self.nodes[sharer] = _after_write(value, result)
            if target.op == "placeholder":
                for dim in result.dims:
                    mark(dim, "a stored tensor is rewritten in the forward pass")
            if isinstance(self.nodes[target], Value) and self.nodes[target].rank == result.rank:
                self.nodes[target] = replace(result, key=self.nodes[node].key)
            self._share(node, target)


class _Uncovered(NamedTuple):
    """Why no rule gave the result of an operation."""

    reason: str


def _by_rule(call: OpCall, full_name: str) -> Value | list[Value] | _Uncovered:
    rule = RULES.get(call.name) if full_name.startswith(("aten.", "prims.")) else None
    if rule is None:
        return _Uncovered(f"no rule for {full_name}")
    try:
        result = rule(call)
        if not _fits(result, call.shapes):
            return _Uncovered(f"the rule for {full_name} does not cover this use")
        return result
    except NotCovered:
        return _Uncovered(f"the rule for {full_name} does not cover these arguments")
    except Exception as error:  # a defect of one rule must not cost the user the whole layout
        if os.environ.get(STRICT_RULES) == "1":
            raise
        return _Uncovered(f"internal error in the rule of {full_name}: {in_a_line(error)}; please report it")


def _constant(shape: tuple[int, ...], tensor: Any) -> Value:
    """A constant of the program; its entries too, where they are a few integers that can be read."""
    reason = "a constant of the program has it"
    numbers = None
    readable = isinstance(tensor, torch.Tensor) and not tensor.is_meta and type(tensor) is torch.Tensor
    if readable and tensor.dtype == torch.int64 and 0 < tensor.numel() <= 8:
        numbers = tuple(int(n) for n in tensor.flatten().tolist())
    return Value(tuple(fresh(extent, reason) for extent in shape), numbers=numbers)


def _after_write(value: Value, written: Value) -> Value:
    """What is known of a tensor after another one was written into its memory."""
    leaf_of = {id(root(leaf.atom)): leaf for dim in written.dims for leaf in leaves(dim)}

    def factor_after(factor: Factor) -> Factor:
        met = [leaf_of[id(leaf.atom)] for leaf in leaves((factor,)) if id(leaf.atom) in leaf_of]
        zero = factor.zero and all(leaf.zero for leaf in met)
        return Factor(factor.atom, zero, factor.const and bool(met) and all(leaf.const for leaf in met))

    return replace(
        value,
        dims=tuple(tuple(factor_after(factor) for factor in expand(dim)) for dim in value.dims),
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


def mark_outputs(propagation: Propagation) -> None:
    """Give the role `output` to the axes that reach the output of the model."""
    for value in propagation.outputs:
        for dim in value.dims:
            give_role(dim, "output")
