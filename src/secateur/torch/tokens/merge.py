"""Token merging (Bolya et al., 2023): each second token joins the most alike of the others, most alike pairs first."""

import torch

from secateur.errors import ModelError
from secateur.torch.tokens.call import TokenCall


def merged(call: TokenCall, states: torch.Tensor) -> torch.Tensor:
    """The states after the running block, (batch, kept, features): the first token alone, then the others.

    Tokens are as alike as the directions of their keys, and a merged token is the mean of all that it stands for.
    Notes in the call for how many tokens each stands, and where each token of the input went. At most half of the
    tokens can go after one block: ModelError for more.
    """
    if call.keys is None:
        raise ModelError(
            f"the attention of block {call.block} does not go through the attention interface of transformers, so its "
            "tokens cannot be compared"
        )
    batch, count, width = states.shape
    gone = count - call.schedule.count(call.block, call.length)
    sizes = states.new_ones(batch, count) if call.sizes is None else call.sizes
    keys = call.keys / call.keys.norm(dim=-1, keepdim=True)
    giving, taking = keys[:, 1::2], keys[:, 2::2]
    if gone > giving.shape[1]:
        raise ModelError(
            f"{gone} of {count} tokens are to be merged after block {call.block}; at most half of them can go"
        )
    likeness, partner = (giving @ taking.transpose(1, 2)).max(-1)
    ranked = likeness.topk(giving.shape[1], dim=1).indices
    source, kept = ranked[:, :gone], ranked[:, gone:]
    target = partner.gather(1, source)

    given, given_sizes = gather(states[:, 1::2], source), sizes[:, 1::2].gather(1, source)
    taken_sizes = sizes[:, 2::2]
    total = taken_sizes.scatter_add(1, target, given_sizes)
    sums = (states[:, 2::2] * taken_sizes[:, :, None]).scatter_add(
        1, target[:, :, None].expand(-1, -1, width), given * given_sizes[:, :, None]
    )
    call.sizes = torch.cat([sizes[:, :1], sizes[:, 1::2].gather(1, kept), total], 1)
    if not call.schedule.pooled:
        _note_places(call, source, kept, target, count)
    return torch.cat([states[:, :1], gather(states[:, 1::2], kept), sums / total[:, :, None]], 1)


def gather(states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The states (batch, tokens, features) of the chosen tokens (batch, kept)."""
    return states.gather(1, chosen[:, :, None].expand(-1, -1, states.shape[2]))


def _note_places(call: TokenCall, source: torch.Tensor, kept: torch.Tensor, target: torch.Tensor, count: int) -> None:
    """Note at which place each token of the input is found now."""
    batch, stay = kept.shape
    first_taking = 1 + stay
    places = torch.zeros(batch, count, dtype=torch.long, device=kept.device)
    places[:, 2::2] = first_taking + torch.arange(places[:, 2::2].shape[1], device=kept.device)
    places = places.scatter(1, 2 * kept + 1, 1 + torch.arange(stay, device=kept.device).expand(batch, -1))
    places = places.scatter(1, 2 * source + 1, first_taking + target)
    call.source = places if call.source is None else places.gather(1, call.source)
