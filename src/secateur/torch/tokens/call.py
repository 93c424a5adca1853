"""The state of one forward pass of a model with a schedule of tokens. It lives in the call and not in a module, so that
threads and models inside models do not meet.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.token_schedule import TokenSchedule
from secateur.torch.tokens.sites import TokenSites

INSTEAD = "; leave its tokens alone, and prune its heads, neurons or layers with secateur.prune"
"""What to do with a model whose tokens cannot be taken away."""
NO_MASK = "tokens that are merged take no mask; leave it out, or run under secateur.dynamic.all_tokens()"


@dataclass(eq=False)
class TokenCall:
    """One forward pass.

    owner: the module that holds the blocks.
    ignored: whether this pass takes no notice of the schedule.
    length: tokens of the input, known from the first block on.
    block: the block that runs.
    entered: tokens that entered it.
    positions: (batch, tokens) of those that are left in the input; None while all are.
    chosen: (batch, tokens) that the running block keeps, as positions among those that entered it; None for all.
    score: (batch, tokens) of those that entered the running block; higher is kept.
    earlier: the score of the last block in which the pooled token saw every token, of those that are left.
    keys: (batch, tokens, features) mean over heads, which say how alike tokens are.
    sizes: (batch, tokens) how many tokens of the input each stands for; None while each stands for itself.
    source: (batch, length) which of the tokens that are left stands for each token of the input.
    """

    schedule: TokenSchedule
    sites: TokenSites
    owner: Any = None
    ignored: bool = False
    length: Any = None
    block: int = -1
    entered: Any = None
    positions: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    score: torch.Tensor | None = None
    earlier: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    source: torch.Tensor | None = None
    scored: list[int] = field(default_factory=list)
    """Blocks whose attention was seen."""

    @property
    def is_last(self) -> bool:
        """Whether the running block is the last one."""
        return self.block == len(self.schedule.keep) - 1


_calls: ContextVar[tuple[TokenCall, ...]] = ContextVar("secateur_token_calls", default=())


def enter(call: TokenCall) -> None:
    """Make `call` the running one."""
    _calls.set((*_calls.get(), call))


def leave(owner: Any) -> TokenCall | None:
    """End the running call of a module, and return it; None where it began none, as another hook raised before."""
    *earlier, call = _calls.get() or (None,)
    if call is None or call.owner is not owner:
        return None
    _calls.set(tuple(earlier))
    return call


def running() -> TokenCall | None:
    """The running call of this thread, or None."""
    calls = _calls.get()
    return calls[-1] if calls else None
