"""Blocks of a decoder that take one token of each sequence in two calls of the kernels, before and after its keys and
values go into the cache, where transformers runs some hundred operations of torch. Other calls run as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from secateur.kernels.native import load_native
from secateur.kernels.packing import ACTIVATIONS
from secateur.kernels.steps import ATTENTION, GATE, LINEAR, NONE, NORM, ROTARY, Op, step_from_json, table, three_reads
from secateur.runtime.layers.linear import ByTokens, SparseLinear
from secateur.runtime.layers.operators import activated, alone, mask_of
from secateur.runtime.program.find_decoder_steps import CACHE, IGNORED, PLACE, DecoderForm
from secateur.runtime.run.chain import Swapped, children, swapped, untouched

NOTHING_CACHED = (0, 0, 0, (0, 0, 0), (0, 0, 0), 0, 0, (0, 0, 0))
"""What `Token.run` is told of the cache and the mask before the token is in it."""


@dataclass(frozen=True)
class DecoderProgram:
    """What a block computes, as in `DecoderBlock`, with paths inside the block."""

    form: DecoderForm
    steps: tuple[Op, ...]
    attention: str
    width: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderProgram:
        """A plan from what `dataclasses.asdict` made of it.

        Raises:
            TypeError, KeyError, AttributeError: when it is none.
        """
        form = DecoderForm(**{**data["form"], "names": tuple(data["form"]["names"])})
        return cls(form, tuple(map(step_from_json, data["steps"])), data["attention"], data["width"])


@dataclass
class TokenInputs:
    """What comes with a token: the mask of attention (batch, heads, 1, keys), cosines and sines (batch, 1, width), and
    the cache; a batch or heads of 1 are for all."""

    mask: torch.Tensor | None
    turns: tuple[torch.Tensor, torch.Tensor] | None
    cache: Any


class DecoderRunner:
    """A plan on the modules of a block.

    Raises:
        AttributeError: when the block does not hold what the plan names.
        ValueError: when the steps do not fit together.
    """

    def __init__(self, block: nn.Module, plan: DecoderProgram):
        self.block, self.plan = block, plan
        self.heads = _checked(plan)
        self.steps = _joined(plan.steps)
        self.inside = children([block])
        self.place_in_cache = block.get_submodule(plan.attention)
        if not isinstance(getattr(self.place_in_cache, PLACE, None), int):
            raise AttributeError(f"{plan.attention} has no {PLACE}")
        self.attends = self._attends()
        self._prepared: dict[int, _Prepared] = {}
        self._prepare(1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}  # it holds addresses

    def prepared(self, batch: int) -> _Prepared | None:
        """The steps for so many tokens; None where weights were exchanged for others that the kernels do not take."""
        try:
            return self._prepare(batch)
        except (AttributeError, ValueError):
            return None

    def _prepare(self, batch: int) -> _Prepared:
        prepared = self._prepared.get(batch)
        if prepared is None or not prepared.is_current():
            if prepared is not None:
                self._prepared.clear()  # the others may hold what is gone from the block
            prepared = self._prepared[batch] = _Prepared(self.block, self.steps, self.plan.width, batch)
        return prepared

    def _attends(self) -> tuple[Any, Any]:
        """By which function and with which factor transformers' attention would compute."""
        config = getattr(self.place_in_cache, "config", None)
        name = None if config is None else vars(config).get("_attn_implementation_internal")
        return name, getattr(self.place_in_cache, "scaling", None)

    def run(self, x: torch.Tensor, given: TokenInputs, prepared: _Prepared) -> torch.Tensor:
        """What the block gives for x (batch, 1, width), prepared for the batch."""
        batch = x.shape[0]
        values = x.new_empty(batch * prepared.floats)
        cos, sin, apart = 0, 0, 0
        if given.turns is not None:
            cos, sin = given.turns[0].data_ptr(), given.turns[1].data_ptr()
            apart = given.turns[0].stride(0) if given.turns[0].shape[0] > 1 else 0
        cached: tuple[Any, ...] = NOTHING_CACHED
        keep: Any = None  # keys, values and mask live until the kernels have run
        for begin, end in prepared.stretches:
            step = self.steps[begin]
            if step.kind == ATTENTION:
                cached, keep = self._cached(step, values, prepared, given, batch)
            elif prepared.layers[begin] is not None:
                prepared.compute(begin, step, x, values, batch)
                continue
            prepared.token.run(
                begin, end, batch, x.data_ptr(), values.data_ptr(), cos, sin, apart, *cached, torch.get_num_threads()
            )
        del keep
        return prepared.value(len(self.steps), x, values, batch).unsqueeze(1)

    def _cached(
        self, step: Op, values: torch.Tensor, prepared: _Prepared, given: TokenInputs, batch: int
    ) -> tuple[tuple[Any, ...], Any]:
        """Put the keys and values of the token into the cache; what `Token.run` wants to know of it and of the mask,
        and what has to live as long.
        """
        heads, kv_heads, width = step.heads
        size = (batch, kv_heads, 1, width)
        stride = (kv_heads * width, width, kv_heads * width, 1)
        key, value = (values.as_strided(size, stride, prepared.first(read, batch)) for read in step.reads[1:])
        keys, held = given.cache.update(key, value, getattr(self.place_in_cache, PLACE))
        count = keys.shape[2]
        if keys.shape != (batch, kv_heads, count, width) or held.shape != keys.shape:
            raise ValueError(f"the cache gives keys {tuple(keys.shape)} and values {tuple(held.shape)}")
        if keys.dtype is not torch.float32 or held.dtype is not torch.float32:
            raise TypeError(f"packed layers want a cache in float32, not {keys.dtype}")
        keys, held = (each if each.stride(3) == 1 else each.contiguous() for each in (keys, held))
        if given.mask is not None and given.mask.shape[3] not in (1, count):
            raise ValueError(f"the mask is of {given.mask.shape[3]} keys, but the cache holds {count}")
        mask, added, kept, apart = mask_of(given.mask, (batch, heads, 1, count))
        places = (keys.data_ptr(), held.data_ptr(), count, keys.stride()[:3], held.stride()[:3], added, kept, apart)
        return places, (keys, held, mask)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, TokenInputs] | None:
        """The token and what comes with it in the arguments of a block; None where the kernels do not know these."""
        form = self.plan.form
        given = {**dict(zip(form.names, args, strict=False)), **kwargs}
        x, mask, turns = given.pop(form.x, None), given.pop(form.mask, None), given.pop(form.turns, None)
        cache = given.pop(CACHE, None)
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.plan.width:
            return None
        if x.dtype is not torch.float32 or x.device.type != "cpu" or cache is None or not x.is_contiguous():
            return None
        if any(value is not None and value is not False and name not in IGNORED for name, value in given.items()):
            return None
        if not self._is_mask(mask, x.shape[0]) or not self._are_turns(turns, x.shape[0]):
            return None
        if torch.is_grad_enabled() and (
            any(t is not None and t.requires_grad for t in (x, mask, *(turns or ())))
            or any(p.requires_grad for p in self.block.parameters())
        ):
            return None
        return None if self._attends() != self.attends else (x, TokenInputs(mask, turns, cache))

    def _is_mask(self, mask: Any, batch: int) -> bool:
        if mask is None:
            return True
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.dtype not in (torch.float32, torch.bool):
            return False
        shape = mask.shape
        return shape[0] in (1, batch) and shape[1] in (1, self.heads[0]) and shape[2] == 1

    def _are_turns(self, turns: Any, batch: int) -> bool:
        if not self.plan.form.turns:
            return turns is None
        return (
            isinstance(turns, tuple)
            and len(turns) == 2
            and isinstance(turns[0], torch.Tensor)
            and isinstance(turns[1], torch.Tensor)
            and turns[0].shape == turns[1].shape
            and turns[0].shape[0] in (1, batch)
            and turns[0].shape[1:] == (1, self.heads[2])
            and all(turn.dtype is torch.float32 and turn.is_contiguous() for turn in turns)
        )


class _Prepared:
    """The steps of a block for so many tokens at a time, with the weights at their addresses. `layers` are those steps
    that torch computes, `stretches` the steps that go together.
    """

    def __init__(self, block: nn.Module, steps: Sequence[Op], width: int, batch: int):
        native: Any = load_native()
        self.parts: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self.addresses: list[int] = []
        self.layers = [_dense(block, step, batch) for step in steps]
        self.rows = [width]

        def place(part: tuple[nn.Module, str]) -> tuple[int, int]:
            module, name = part
            held: Any = module._buffers if name in module._buffers else module._parameters
            tensor = held.get(name)
            if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
                raise AttributeError(f"{type(module).__name__} has no {name}")
            if tensor.dtype not in (torch.uint8, torch.float32) or tensor.device.type != "cpu":
                raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}")
            self.parts.append((held, name, tensor))
            self.addresses.append(tensor.data_ptr())
            return len(self.parts) - 1, tensor.nbytes

        placed = [_placed(block, step, layer, batch) for step, layer in zip(steps, self.layers, strict=True)]
        rows, numbers = table(placed, place)
        sizes = [tensor.nbytes for _, _, tensor in self.parts]
        self.token = native.Token(rows.ctypes.data, numbers.ctypes.data, len(rows), width, self.addresses, sizes)
        self.floats: int = self.token.floats
        for step, layer in zip(placed, self.layers, strict=True):
            wide = self.rows[step.reads[0]]
            if layer is not None and layer.in_features != wide:
                raise ValueError(f"a layer reads {layer.in_features} numbers of {wide}")
            if step.kind == LINEAR:
                wide = layer.out_features if layer is not None else step.weight[0].out_features
            self.rows.append(wide)
        if sum(self.rows[1:]) != self.floats:
            raise ValueError("a packed weight has other rows than its layer says")
        self.firsts = [0, *accumulate(self.rows[1:], initial=0)]
        self.stretches = list(_stretches(steps, self.layers))

    def is_current(self) -> bool:
        """Whether the modules hold the same tensors still, and these lie where they lay."""
        return all(
            tensor.data_ptr() == address and held.get(name) is tensor
            for (held, name, tensor), address in zip(self.parts, self.addresses, strict=True)
        )

    def first(self, value: int, batch: int) -> int:
        """Where a value begins."""
        return self.firsts[value] * batch

    def value(self, number: int, x: torch.Tensor, values: torch.Tensor, batch: int) -> torch.Tensor:
        """A value (batch, rows)."""
        if number == 0:
            return x.view(batch, -1)
        rows = self.rows[number]
        return values.as_strided((batch, rows), (rows, 1), self.first(number, batch))

    def compute(self, number: int, step: Op, x: torch.Tensor, values: torch.Tensor, batch: int) -> None:
        """A step that torch computes."""
        first, gate, residual = (None if v == NONE else self.value(v, x, values, batch) for v in three_reads(step))
        y = activated(self.layers[number](first), step.activation)
        y = y if gate is None else y * gate
        self.value(number + 1, x, values, batch).copy_(y if residual is None else y + residual)


def _checked(plan: DecoderProgram) -> tuple[int, int, int]:
    """The heads of attention in a plan; ValueError where it does not hold together."""
    attends = [step for step in plan.steps if step.kind == ATTENTION]
    if len(attends) != 1:
        raise ValueError(f"a block has one attention, not {len(attends)}")
    if any(len(step.heads) != 3 or not 0 <= min(step.heads) <= max(step.heads) < 1 << 31 for step in plan.steps):
        raise ValueError("heads are three numbers")
    heads = attends[0].heads
    if any(step.kind == ROTARY and step.heads[2] != heads[2] for step in plan.steps):
        raise ValueError("heads are turned that are wider than those of attention")
    if any(not 0 <= step.activation < len(ACTIVATIONS) for step in plan.steps):
        raise ValueError("there is an unknown activation")
    if plan.form.given not in range(8):
        raise ValueError(f"a block gives {plan.form.given!r}")
    return heads


def _dense(block: nn.Module, step: Op, batch: int) -> Any:
    """The layer of a step where it is not packed, else None."""
    if step.kind != LINEAR:
        return None
    layer = _layer(block, step, batch)
    return None if isinstance(layer, SparseLinear) else layer


def _layer(block: nn.Module, step: Op, batch: int) -> nn.Module:
    layer = block.get_submodule(step.weight.removesuffix(".packed"))
    return layer.form_for(batch) if isinstance(layer, ByTokens) else layer


def _placed(block: nn.Module, step: Op, layer: Any, batch: int) -> Op:
    """A step with modules and names of their tensors in place of paths; of a layer that torch computes, its rows."""
    if layer is not None:
        return replace(step, weight=None, bias=None, rows=layer.out_features)
    if step.kind == LINEAR:
        packed = _layer(block, step, batch)
        bias = None if step.bias is None else (packed, "bias")
        return replace(step, weight=(packed, "packed"), bias=bias)
    scale, shift = (_held(block, path) for path in (step.scale, step.shift))
    return replace(step, scale=scale, shift=shift)


def _held(block: nn.Module, path: str | None) -> tuple[nn.Module, str] | None:
    """The module that holds a tensor, and its name there."""
    if path is None:
        return None
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name


def _stretches(steps: Sequence[Op], layers: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Steps that go together: attention begins a stretch, a layer that torch computes is one by itself."""
    begin = 0
    for number, step in enumerate(steps):
        if number > begin and (step.kind == ATTENTION or layers[number] is not None or layers[number - 1] is not None):
            yield begin, number
            begin = number
    yield begin, len(steps)


def _joined(steps: Sequence[Op]) -> list[Op]:
    """The steps, where a layer takes in the gate or the sum that alone reads it: it reads these as well."""
    reads = Counter(value for step in steps for value in step.reads)
    joined: list[Op] = []
    number = {NONE: NONE, 0: 0}
    for place, step in enumerate(steps):
        own = [number[value] for value in step.reads]
        before = joined[-1] if joined else None
        plain = before is not None and before.kind == LINEAR and len(before.reads) == 1
        takes = step.kind == GATE or (step.kind == NORM and not step.norm and step.reads[1] != NONE)
        if plain and before is not None and takes and place in step.reads and reads[place] == 1:
            (other,) = [value for value in own if value != len(joined)]
            joined[-1] = replace(before, reads=[*before.reads, *((other,) if step.kind == GATE else (NONE, other))])
        else:
            joined.append(replace(step, reads=own))
        number[place + 1] = len(joined)
    return joined


class _Decoder(Swapped):
    program: DecoderRunner

    def through(self, plain: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        program = self.program
        read = None if torch.compiler.is_compiling() else program.read(args, kwargs)
        if read is None or not alone(read[0]) or not untouched(program.inside):
            return plain(self, *args, **kwargs)
        prepared = program.prepared(read[0].shape[0])
        if prepared is None:
            return plain(self, *args, **kwargs)
        output, given = program.run(*read, prepared), program.plan.form.given
        return (output, *[None] * (given - 1)) if given else output


def use_decoders(model: nn.Module, plans: Mapping[str, DecoderProgram]) -> None:
    """Let blocks of a model, by path, take a token at a time in one go from now on, wherever they can.

    Raises:
        AttributeError: when a block does not hold what its plan names.
    """
    programs = [DecoderRunner(model.get_submodule(path), plan) for path, plan in plans.items()]
    for program in programs:
        plain: Any = type(program.block)
        program.block.__class__ = swapped(_Decoder, plain)
        program.block.program = program


def decoders_of(model: nn.Module) -> dict[str, DecoderProgram]:
    """The blocks of a model that take a token at a time in one go, by path."""
    return {path: module.program.plan for path, module in model.named_modules() if isinstance(module, _Decoder)}
