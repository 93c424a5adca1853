"""Put a schedule of tokens on a model, take it off, and look the other way for a while."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from secateur.errors import ModelError
from secateur.token_schedule import TokenSchedule
from secateur.torch.base.manifest import submodule
from secateur.torch.tokens import reduce
from secateur.torch.tokens.call import INSTEAD, NO_MASK, TokenCall, enter, leave, running
from secateur.torch.tokens.sites import TokenSites

ATTRIBUTE = "_secateur_token_schedule"

_all_tokens: ContextVar[bool] = ContextVar("secateur_all_tokens", default=False)


@dataclass(frozen=True)
class Installed:
    """A schedule on a model, with the sites of its hooks and the attention that the model had before."""

    schedule: TokenSchedule
    sites: TokenSites
    attention: Any


def tokens_of(model: nn.Module) -> Installed | None:
    """The schedule that a model runs with, or None."""
    found: Installed | None = vars(model).get(ATTRIBUTE)
    return found


def schedule_on(model: nn.Module) -> TokenSchedule | None:
    """The schedule alone that a model runs with, or None."""
    installed = tokens_of(model)
    return None if installed is None else installed.schedule


def install(model: nn.Module, schedule: TokenSchedule, sites: TokenSites) -> None:
    """Make every forward pass of a model keep to a schedule, in place of the one that it had.

    Raises ModelError where the schedule and the sites do not fit the model.
    """
    remove(model)
    blocks = submodule(model, sites.stack)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(schedule.keep):
        raise ModelError(
            f"the schedule of tokens is for {len(schedule.keep)} blocks, which {sites.stack} does not hold"
        )
    parts = [(block, *(submodule(block, path) for path in (sites.inner, sites.feed_forward))) for block in blocks]
    before = _use_scores(model)
    owner = submodule(model, sites.stack.rpartition(".")[0])
    model.register_forward_pre_hook(_refuse_states, with_kwargs=True)
    owner.register_forward_pre_hook(_Begin(schedule, sites))
    owner.register_forward_hook(_end, always_call=True)
    for number, (block, inner, feed_forward) in enumerate(parts):
        block.register_forward_pre_hook(_EnterBlock(number), with_kwargs=True)
        block.register_forward_hook(_leave_block)
        if sites.inner:
            inner.register_forward_hook(_leave_inner)
        if sites.feed_forward:
            feed_forward.register_forward_pre_hook(_enter_feed_forward)
            feed_forward.register_forward_hook(_leave_feed_forward)
    vars(model)[ATTRIBUTE] = Installed(schedule, sites, before)


def remove(model: nn.Module) -> None:
    """Take the schedule off a model, so that all tokens pass again; a model without one is unchanged."""
    installed = vars(model).pop(ATTRIBUTE, None)
    if installed is None:
        return
    _attend_as(model, installed.attention)
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) or hook in _HOOKS]:
                del hooks[key]
                for flags in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                    flags.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def keep_blocks(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Fit the schedule of a model to the blocks that are left of it; a model without one is unchanged.

    kept: module list -> old indices of the blocks that are left.
    """
    installed = tokens_of(model)
    if installed is None or installed.sites.stack not in kept:
        return
    left = kept[installed.sites.stack]
    if left:
        install(model, installed.schedule.without(left), installed.sites)
    else:
        remove(model)


@contextlib.contextmanager
def passing_by(model: nn.Module, blocks: Collection[tuple[str, int]]) -> Iterator[None]:
    """A context in which the schedule of a model takes no tokens away in these blocks, as when they are gone.

    blocks: module list and index of each.
    """
    installed = tokens_of(model)
    gone = {index for path, index in blocks if installed is not None and path == installed.sites.stack}
    if installed is None or not gone:
        yield
        return
    install(model, installed.schedule.passing_by(gone), installed.sites)
    try:
        yield
    finally:
        install(model, installed.schedule, installed.sites)


@contextlib.contextmanager
def all_tokens() -> Iterator[None]:
    """A context in which models of this thread ignore their schedules: every token passes."""
    token = _all_tokens.set(True)
    try:
        yield
    finally:
        _all_tokens.reset(token)


@contextlib.contextmanager
def using_scores(model: nn.Module) -> Iterator[None]:
    """A context in which the attention of a model is the one that can be scored; ModelError where it cannot."""
    before = _use_scores(model)
    try:
        yield
    finally:
        _attend_as(model, before)


def _attend_as(model: Any, attention: Any) -> None:
    model.set_attn_implementation(attention)


def _use_scores(model: Any) -> Any:
    """Let the attention of a model be scored; returns the name of the attention that it had."""
    from secateur.torch.tokens import scores  # registers the attention; imports transformers

    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if getattr(config, "output_attentions", False):
        raise ModelError(
            "the config asks for output_attentions, which cannot be given with a schedule of tokens; set it to False"
        )
    if hasattr(model, "set_attn_implementation") and before is not None:
        with contextlib.suppress(ValueError):  # a model without the interface; others keep what they have
            model.set_attn_implementation(scores.NAME)
        if config._attn_implementation == scores.NAME:
            return before
    raise ModelError(
        f"a {type(model).__name__} has attention of its own, which does not go through the attention interface of "
        f"transformers, so its tokens cannot be scored{INSTEAD}"
    )


# -- hooks: without state of their own, so that a copied model runs as the first does --------------------------------


class _Hook:
    """A hook that knows a number or a schedule."""


class _Begin(_Hook):
    """Starts the call of the module that holds the blocks."""

    def __init__(self, schedule: TokenSchedule, sites: TokenSites) -> None:
        self.schedule, self.sites = schedule, sites

    def __call__(self, module: nn.Module, args: Any) -> None:
        enter(TokenCall(self.schedule, self.sites, owner=module, ignored=_all_tokens.get()))


def _end(module: nn.Module, args: Any, output: Any) -> None:
    leave(module)


class _EnterBlock(_Hook):
    """Gives a block the masks and tables of the tokens that are left."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = _running(module)
        if call.ignored:
            return None
        call.block, call.chosen, call.score, call.keys = self.number, None, None, None
        leaves, spec = tree_flatten_with_path((args, kwargs))
        call.entered = _stream(leaves).shape[1]
        if call.length is None:
            call.length = call.entered
        if call.positions is None and call.sizes is None:
            return None
        return tree_unflatten([_of_kept(call, keystr(path), value) for path, value in leaves], spec)


def _of_kept(call: TokenCall, name: str, value: Any) -> Any:
    """An argument of a block, of the tokens that are left. The stream, which comes first, has only those already."""
    if not isinstance(value, torch.Tensor) or name == STREAM:
        return value
    dims = call.sites.arguments.get(name)
    if dims is None and value.dim() == 4 and value.shape[2] == value.shape[3] == call.length:
        dims = (2, 3)  # a mask, which models leave out while it hides nothing, and make for torch.export
    if dims is None:
        raise ModelError(
            f"a block is called with {name}, which it was not when its schedule of tokens was made; make the schedule "
            "anew from a host whose example has the same inputs"
        )
    if call.sizes is not None:
        return None if dims else value  # no token is masked (see `attend`)
    return reduce.arguments_of_kept(call, value, dims)


STREAM = "[0][0]"
"""The name of the first argument of a block: the states of its tokens."""


def _stream(leaves: Any) -> torch.Tensor:
    name, value = keystr(leaves[0][0]), leaves[0][1]
    if name != STREAM or not isinstance(value, torch.Tensor) or value.dim() != 3:
        raise ModelError("the blocks are not called with the states of their tokens first; leave its tokens alone")
    return value


def _leave_inner(module: nn.Module, args: Any, output: Any) -> Any:
    call = _running(module)
    return output if call.ignored else first_replaced(output, reduce.reduced(call, first_of(output)))


def _enter_feed_forward(module: nn.Module, args: Any) -> Any:
    call = _running(module)
    return None if call.ignored else (reduce.enter_feed_forward(call, args[0]), *args[1:])


def _leave_feed_forward(module: nn.Module, args: Any, output: Any) -> Any:
    call = _running(module)
    return output if call.ignored else first_replaced(output, reduce.leave_feed_forward(call, first_of(output)))


def _leave_block(module: nn.Module, args: Any, output: Any) -> Any:
    call = _running(module)
    if call.ignored:
        return output
    states = first_of(output)
    if not call.sites.inner:
        states = reduce.reduced(call, states)
    return first_replaced(output, reduce.restored(call, states))


def _refuse_states(module: nn.Module, args: Any, kwargs: Any) -> None:
    if _all_tokens.get():
        return
    installed, config = tokens_of(module), getattr(module, "config", None)
    if installed is not None and installed.schedule.method == "merge" and kwargs.get("attention_mask") is not None:
        raise ModelError(NO_MASK)
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name, getattr(config, name, False)):
            raise ModelError(
                f"the model runs with a schedule of tokens, so its blocks have no common length and {name} cannot be "
                "given; leave it out, or run under secateur.dynamic.all_tokens()"
            )


_HOOKS = (_end, _leave_block, _leave_inner, _enter_feed_forward, _leave_feed_forward, _refuse_states)


def _running(module: nn.Module) -> TokenCall:
    call = running()
    if call is None:
        raise ModelError(
            f"a {type(module).__name__} with a schedule of tokens ran outside its model, as gradient checkpointing "
            "does; call the model, or take the schedule off"
        )
    return call


def first_of(output: Any) -> Any:
    """The states among what a module gives back."""
    return output[0] if isinstance(output, tuple | list) else output


def first_replaced(output: Any, states: Any) -> Any:
    """What a module gives back, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple | list) else states
