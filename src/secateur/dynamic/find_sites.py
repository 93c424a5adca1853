"""Where tokens of a model can be taken away, found by running it, and proved by running it.

Which arguments of a block count tokens shows when the model runs on two lengths. That a block treats tokens alike is
proved by a permutation: permuted tokens, with permuted masks and tables, must give the permuted output. A model whose
blocks fail (relative positions inside the attention, windows) is refused with the reason.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from secateur.errors import ModelError
from secateur.layout import Layout
from secateur.token_schedule import TokenSchedule
from secateur.torch.base.batches import evaluating, run
from secateur.torch.base.expected_errors import EXPECTED
from secateur.torch.base.manifest import submodule
from secateur.torch.blockwise.block_calls import BlockCall, chains
from secateur.torch.data.text_rows import text_positions
from secateur.torch.tokens.call import INSTEAD, running
from secateur.torch.tokens.install import STREAM, first_of, first_replaced, install, remove, tokens_of, using_scores
from secateur.torch.tokens.sites import TokenSites
from secateur.torch.trace.export import attribute, configs_of

LENGTHS = (37, 53)
"""Tokens of the two texts that a model is run on; a model with fewer positions is run on shorter ones."""
ROWS = 3
PADDED = 3
"""Tokens of the first text that are padding."""
TOLERANCE = 1e-5
"""Largest error, relative to the largest number, that counts as rounding."""


@dataclass(frozen=True)
class Found:
    """Where the tokens of a model can be taken away.

    blocks: how many blocks it has.
    pools_first: whether nothing but the first token's state is read after the last block.
    takes_padding: whether the model reads a mask of padding.
    permutation_error: the largest difference between the output for permuted tokens and the permuted output of a block,
        relative to the largest number.
    """

    sites: TokenSites
    blocks: int
    pools_first: bool
    takes_padding: bool
    permutation_error: float = field(default=0.0, compare=False)


def find_sites(model: nn.Module, layout: Layout, example: Mapping[str, Any]) -> Found:
    """Where the tokens of a model can be taken away.

    example: inputs of the model by name.

    Raises ModelError with the reason where no token can be taken away.
    """
    if tokens_of(model) is not None:
        raise ModelError("the model has a schedule of tokens already; take it off first")
    stack, paths = _stack(layout)
    with evaluating(model), torch.no_grad(), using_scores(model), _without_caches(model):
        longer, batch = _batches(model, example)
        calls = _calls_of(model, paths, batch)
        others = calls if longer is None else _calls_of(model, paths, longer)
        arguments = _token_dims(calls, others)
        probes = [_Probe(model, call, arguments) for call in calls[1:]]
        permutation_error = max(probe.check_permutation() for probe in probes)
        inner, feed_forward = _inner(probes), ""
        if not inner:
            feed_forward = _feed_forward(probes)
        sites = TokenSites(stack, inner, feed_forward, arguments)
        pools_first = _pools_first(model, stack, batch)
    _check(model, sites, len(paths), batch, pools_first=pools_first)
    return Found(sites, len(paths), pools_first, "attention_mask" in batch, permutation_error)


@contextlib.contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """A context in which no config asks for a key-value cache, which a block that runs twice would fill twice."""
    with contextlib.ExitStack() as stack:
        for config in configs_of(model):
            stack.enter_context(attribute(config, "use_cache", value=False))
        yield


def _stack(layout: Layout) -> tuple[str, list[str]]:
    """The path of the module list that holds the blocks, and the paths of the blocks."""
    if not any(axis.kind == "layer" and axis.path for axis in layout.axes.values()):
        raise ModelError(f"no list of blocks was found in the model, or its blocks share their weights{INSTEAD}")
    stacks = chains(layout)
    if len(stacks) > 1:
        names = ", ".join(stacks)
        raise ModelError(f"the tokens flow through {names}, and a schedule is for one stack of blocks{INSTEAD}")
    return next(iter(stacks.items()))


def _batches(model: nn.Module, example: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """A batch of longer texts and one of shorter ones, with padding; for inputs of one size None and that size."""
    main = getattr(model, "main_input_name", "input_ids")
    value = example.get(main)
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dim() != 2:
        return None, {name: _rows(v, ROWS) for name, v in example.items() if isinstance(v, torch.Tensor)}
    most = text_positions(model)
    longest = LENGTHS[1] if most is None else min(LENGTHS[1], most)
    shortest = min(LENGTHS[0], longest * LENGTHS[0] // LENGTHS[1])
    if shortest <= PADDED + 4:
        raise ModelError(f"the model takes {longest} tokens at most, too few to take any away")
    if "attention_mask" in inspect.signature(model.forward).parameters:
        example = {"attention_mask": torch.ones_like(value), **example}
    return (
        {n: _of_length(n, v, value.shape[1], longest) for n, v in example.items()},
        {n: _of_length(n, v, value.shape[1], shortest) for n, v in example.items()},
    )


def _of_length(name: str, value: Any, before: int, length: int) -> Any:
    """An input with another number of tokens: its own tokens again and again, and padding at the end of one text."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] != before:
        return value
    longer = _rows(value, ROWS)[:, torch.arange(length, device=value.device) % before].clone()
    if name == "attention_mask":
        longer.fill_(1)
        longer[0, -PADDED:] = 0
    return longer


def _rows(value: torch.Tensor, count: int) -> torch.Tensor:
    return value[torch.arange(count, device=value.device) % len(value)]


def _calls_of(model: nn.Module, paths: Sequence[str], batch: Mapping[str, Any]) -> list[BlockCall]:
    """How each block is called on a batch; ModelError unless each is called once, in order."""
    calls: list[BlockCall] = []

    def note(path: str) -> Any:
        return lambda module, args, kwargs: calls.append(BlockCall(path, args, kwargs))

    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = submodule(model, path).register_forward_pre_hook(note(path), with_kwargs=True)
            stack.callback(handle.remove)
        run(model, dict(batch))
    if [call.path for call in calls] != list(paths):
        raise ModelError(f"the blocks of the model do not run once each, one after the other{INSTEAD}")
    return calls


def _tensors(call: BlockCall) -> dict[str, torch.Tensor]:
    leaves, _ = tree_flatten_with_path((call.args, call.kwargs))
    return {keystr(path): value for path, value in leaves if isinstance(value, torch.Tensor)}


def _token_dims(calls: Sequence[BlockCall], longer: Sequence[BlockCall]) -> dict[str, tuple[int, ...]]:
    """Name of each tensor that blocks are called with -> the dimensions whose size is the number of tokens."""
    stream = _tensors(calls[0]).get(STREAM)
    if stream is None or stream.dim() != 3:
        raise ModelError(
            "the blocks are not called with the states of their tokens first, as (batch, tokens, features)" + INSTEAD
        )
    tokens = stream.shape[1]
    found: dict[str, tuple[int, ...]] = {}
    for call, other in zip(calls, longer, strict=True):
        others = _tensors(other)
        for name, value in _tensors(call).items():
            if name == STREAM:
                continue
            twin = others[name]
            varies = [d for d, size in enumerate(value.shape) if twin is value or size != twin.shape[d]]
            dims = tuple(d for d in varies if value.shape[d] == tokens)
            if 0 in dims:
                raise ModelError(f"a block reads {name}, whose tokens come before the batch{INSTEAD}")
            if found.setdefault(name, dims) != dims:
                raise ModelError(f"{name} counts tokens differently in two blocks{INSTEAD}")
    return found


class _Probe:
    """One block with the arguments that it was called with, and what it gave."""

    def __init__(self, model: nn.Module, call: BlockCall, arguments: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.block, self.call = call.path, submodule(model, call.path), call
        self.arguments = {STREAM: (1,), **arguments}
        self.output = first_of(call.run(self.block))
        self.tokens = self.output.shape[1]
        generator = torch.Generator().manual_seed(0)
        order = 1 + torch.randperm(self.tokens - 1, generator=generator)
        self.order = torch.cat([torch.zeros(1, dtype=torch.long), order]).to(self.output.device)

    def check_permutation(self) -> float:
        """The error of the output for permuted tokens; ModelError for more than rounding."""
        leaves, spec = tree_flatten_with_path((self.call.args, self.call.kwargs))
        moved = [self._permuted(keystr(path), value) for path, value in leaves]
        args, kwargs = tree_unflatten(moved, spec)
        try:
            output = first_of(self.block(*args, **kwargs))
        except EXPECTED as reason:
            raise ModelError(f"{self.path} does not run on reordered tokens ({reason}){INSTEAD}") from None
        error = _error(output, self.output[:, self.order])
        if not error <= TOLERANCE:
            raise ModelError(
                f"{self.path} knows the places of its tokens by itself (relative positions or windows; reordered ones "
                f"change its output by {error:.1g}), so none can be taken away{INSTEAD}"
            )
        return error

    def _permuted(self, name: str, value: Any) -> Any:
        for dim in self.arguments.get(name, ()) if isinstance(value, torch.Tensor) else ():
            value = value.index_select(dim, self.order)
        return value

    def keeps(self, hooks: Sequence[tuple[nn.Module, Any, Any]]) -> bool:
        """Whether the block with hooks gives the output of the first two thirds of `order`.

        hooks: module, what it gets instead of its input, what it gives instead of its output; None for no change.
        """
        with contextlib.ExitStack() as stack:
            for module, before, after in hooks:
                if before is not None:
                    hook = module.register_forward_pre_hook(lambda m, a, f=before: (f(a[0]), *a[1:]))
                    stack.callback(hook.remove)
                if after is not None:
                    hook = module.register_forward_hook(lambda m, a, o, f=after: first_replaced(o, f(first_of(o))))
                    stack.callback(hook.remove)
            try:
                output = first_of(self.call.run(self.block))
            except EXPECTED:
                return False
        return _equal(output, self.output[:, self.kept])

    @property
    def kept(self) -> torch.Tensor:
        """Tokens that stay in a trial."""
        return self.order[: self.tokens * 2 // 3]

    def parts(self) -> list[str]:
        """Paths of the modules in the block, outer ones first."""
        return [path for path, _ in self.block.named_modules() if path]

    def keeps_after(self, path: str) -> bool:
        """Whether taking tokens from the output of a module is taking them from the block's."""
        return self.keeps([(submodule(self.block, path), None, lambda states: states[:, self.kept])])

    def keeps_in(self, path: str) -> bool:
        """Whether a module can run on the kept tokens alone."""

        def spread(states: torch.Tensor) -> torch.Tensor:
            whole = states.new_zeros(states.shape[0], self.tokens, states.shape[2])
            whole[:, self.kept] = states
            return whole

        hooks = [
            (submodule(self.block, path), lambda states: states[:, self.kept], spread),
            (self.block, None, lambda states: states[:, self.kept]),
        ]
        return self.keeps(hooks)


def _inner(probes: Sequence[_Probe]) -> str:
    """The first module after whose output a block reads no other token; empty for none."""
    first, *others = probes
    for path in first.parts():
        if first.keeps_after(path) and all(probe.keeps_after(path) for probe in others):
            return path
    return ""


def _feed_forward(probes: Sequence[_Probe]) -> str:
    """The largest module of a block that can run on the kept tokens alone; empty for none."""
    first, *others = probes
    sizes = {path: sum(p.numel() for p in submodule(first.block, path).parameters()) for path in first.parts()}
    for path in sorted((path for path, size in sizes.items() if size), key=lambda path: -sizes[path]):
        if first.keeps_in(path) and all(probe.keeps_in(path) for probe in others):
            return path
    return ""


def _pools_first(model: nn.Module, stack: str, batch: Mapping[str, Any]) -> bool:
    """Whether the outputs stay the same when, after the blocks, every state but the first token's is noise."""
    last = submodule(model, f"{stack}.{len(submodule(model, stack)) - 1}")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)

    def noise(module: nn.Module, args: Any, output: Any) -> Any:
        states = first_of(output)
        drawn = torch.randn(states[:, 1:].shape, generator=generator).to(states)
        return first_replaced(output, torch.cat([states[:, :1], drawn], 1))

    before = _floats(run(model, dict(batch)))
    with _hooked(last, noise):
        return _alike(before, _floats(run(model, dict(batch))))


def _floats(output: Any) -> list[torch.Tensor]:
    leaves, _ = tree_flatten_with_path(dict(output) if isinstance(output, Mapping) else output)
    return [value for _, value in leaves if isinstance(value, torch.Tensor) and value.is_floating_point()]


def _alike(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(map(_equal, after, before))


def _equal(value: Any, expected: torch.Tensor) -> bool:
    return _error(value, expected) <= TOLERANCE


def _error(value: Any, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number where that exceeds 1; infinite for another shape."""
    if not isinstance(value, torch.Tensor) or value.shape != expected.shape:
        return float("inf")
    return float((value - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _check(model: nn.Module, sites: TokenSites, blocks: int, batch: Mapping[str, Any], *, pools_first: bool) -> None:
    """ModelError unless each block asks the attention interface once, and the model with a schedule that loses nothing
    answers as it does without.
    """
    seen: list[int] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        call = running()
        seen.extend(call.scored if call is not None else ())

    with evaluating(model), torch.no_grad():
        dense = _floats(run(model, dict(batch)))
        install(model, TokenSchedule((100,) * blocks, pooled=pools_first), sites)
        try:
            with _hooked(submodule(model, f"{sites.stack}.{blocks - 1}"), note):
                exact = _floats(run(model, dict(batch)))
        finally:
            remove(model)
    if seen != list(range(blocks)):
        raise ModelError(
            "the attention of the blocks does not go through the attention interface of transformers, so tokens cannot "
            f"be scored{INSTEAD}"
        )
    if not _alike(dense, exact):
        raise ModelError(f"the model answers otherwise with a schedule of tokens that loses nothing{INSTEAD}")


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
