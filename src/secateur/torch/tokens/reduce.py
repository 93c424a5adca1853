"""Which tokens go on, and what is gathered for them: states, masks and tables of positions.

The pooled token is the first; it always goes on and stays the first. Padding goes before anything else.
"""

from collections.abc import Sequence

import torch

from secateur.errors import ModelError
from secateur.torch.tokens.call import TokenCall
from secateur.torch.tokens.merge import gather, merged


def reduced(call: TokenCall, states: torch.Tensor) -> torch.Tensor:
    """The states of the tokens that go on after the running block, (batch, kept, features)."""
    if call.is_last and call.schedule.pooled:
        return states[:, :1]
    if not call.schedule.reduces(call.block):
        return states
    if call.schedule.method == "merge":
        return merged(call, states)
    chosen = choose(call)
    call.positions = chosen if call.positions is None else call.positions.gather(1, chosen)
    call.earlier = None if call.earlier is None else call.earlier.gather(1, chosen)
    return gather(states, chosen)


def choose(call: TokenCall) -> torch.Tensor:
    """(batch, kept): which tokens of those that entered the running block go on; kept in `call.chosen`."""
    if call.chosen is None:
        score = _score(call)
        first = torch.full_like(score[:, :1], 2.0)  # above any share of attention
        ranked = torch.cat([first, score[:, 1:]], 1)
        call.chosen = ranked.topk(call.schedule.count(call.block, call.length), dim=1).indices
    return call.chosen


def _score(call: TokenCall) -> torch.Tensor:
    """The score of the running block; ModelError where its attention was not seen."""
    if call.score is None:
        raise ModelError(
            f"the attention of block {call.block} does not go through the attention interface of transformers, so its "
            "tokens cannot be scored"
        )
    return call.score


def enter_feed_forward(call: TokenCall, states: torch.Tensor) -> torch.Tensor:
    """What enters a token-wise module in the middle of a block."""
    if call.is_last and call.schedule.pooled:
        return states[:, :1]
    if call.schedule.method == "merge" or not call.schedule.reduces(call.block):
        return states
    return gather(states, choose(call))


def leave_feed_forward(call: TokenCall, states: torch.Tensor) -> torch.Tensor:
    """What leaves it: what it gave for the tokens that go on, at their places among all; the others get zeros.

    What it gave for the pooled token alone is added to every token, of which only the pooled one leaves the block.
    """
    if call.chosen is None:
        return states
    index = call.chosen[:, :, None].expand(-1, -1, states.shape[2])
    return states.new_zeros(states.shape[0], call.entered, states.shape[2]).scatter(1, index, states)


def arguments_of_kept(call: TokenCall, value: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """An argument of a block, whose first dimension is the batch or 1, of the tokens that are left.

    Of `dims`, those of size 1 hold for every token.
    """
    if call.positions is None or not dims:
        return value
    if max(dims) >= value.dim():
        raise ModelError(
            f"a block is called with a tensor of {value.dim()} dimensions, of which {max(dims)} is to count tokens; "
            "give the model its schedule again"
        )
    batch, kept = call.positions.shape
    value = value.expand(batch, *[-1] * (value.dim() - 1))
    for dim in (dim for dim in dims if value.shape[dim] != 1):
        index = call.positions.view(batch, *[kept if d == dim else 1 for d in range(1, value.dim())])
        value = value.gather(dim, index.expand(*[kept if d == dim else size for d, size in enumerate(value.shape)]))
    return value


def restored(call: TokenCall, states: torch.Tensor) -> torch.Tensor:
    """What leaves the last block where other tokens than the first are read: tokens that were merged get the state that
    they share. What leaves another block is unchanged.
    """
    return gather(states, call.source) if call.is_last and call.source is not None else states
