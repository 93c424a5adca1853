"""Give a host a schedule of tokens: pruned by the attention of the pooled token, or merged."""

from collections.abc import Sequence
from typing import Any

from secateur.dynamic.find_sites import Found, find_sites
from secateur.errors import ModelError
from secateur.token_schedule import DEFAULT, TokenSchedule, schedule_of
from secateur.torch.base.batches import by_name, without_labels
from secateur.torch.files.saving import attach
from secateur.torch.host import TorchHost
from secateur.torch.tokens.call import INSTEAD
from secateur.torch.tokens.install import install, remove

Wanted = str | Sequence[int] | TokenSchedule
"""A preset, per cents of the input's tokens after the blocks, or a schedule; see `secateur.token_schedule`."""


def prune_tokens(host: Any, schedule: Wanted = DEFAULT, *, found: Found | None = None) -> TorchHost:
    """A copy of the host that leaves out tokens which the pooled token hardly attends to (after PoWER-BERT, Goyal et
    al., 2020, without training), and works on the pooled token alone after the last attention.

    host: of `secateur.open`; it stays as it is.
    schedule: a preset (exact, mild, mid, fast), per cents that end before the last block, or a `TokenSchedule`.
    found: of `find_sites`, where it is known already.

    Raises ModelError with the reason where no token can be taken away: blocks that know the places of their tokens,
    attention that cannot be scored, outputs that need every token.
    """
    found = prunable(host, found)
    return _with_schedule(host, schedule_of(schedule, found.blocks), found)


def prunable(host: Any, found: Found | None = None) -> Found:
    """Where tokens of a host's model can be left out; ModelError with the reason where they cannot.

    found: of `find_sites`, where it is known already.
    """
    found = found or sites_of(host)
    if not found.pools_first:
        raise ModelError(
            f"a {type(host.model).__name__} reads other tokens than the first after its last block, so none can be "
            "left out; token pruning is for models that read the first token alone, as classifiers of texts do; "
            "merge_tokens takes models of images"
        )
    return found


def merge_tokens(host: Any, schedule: Wanted = DEFAULT, *, found: Found | None = None) -> TorchHost:
    """A copy of the host that averages tokens with like keys (Bolya et al., 2023): for images, whose tokens repeat
    themselves. Where all tokens are read after the last block, each gets the state of the token that it went into.

    Arguments as for `prune_tokens`. Raises ModelError with the reason where no token can be merged.
    """
    found = found or sites_of(host)
    if found.takes_padding:
        raise ModelError(
            f"a {type(host.model).__name__} reads texts with padding, and tokens are merged in models of images or "
            "sounds without a mask; leave tokens of texts out instead (--tokens, or prune_tokens)"
        )
    if tables := [name for name, dims in found.sites.arguments.items() if dims]:
        raise ModelError(
            f"the blocks read a table of their tokens ({tables[0]}), which merged ones have no row of{INSTEAD}"
        )
    merged = _with_schedule(host, schedule_of(schedule, found.blocks, method="merge", pooled=found.pools_first), found)
    merged.outputs(host.example)  # a schedule may ask for more than half of the tokens at once
    return merged


def without_schedule(host: TorchHost) -> TorchHost:
    """A copy of the host through which all tokens pass again."""
    copy = host.copy()
    remove(copy.model)
    attach(copy.model)
    return copy


def sites_of(host: Any) -> Found:
    """Where tokens of a host's model can be taken away; ModelError with the reason where they cannot."""
    if not isinstance(host, TorchHost):
        raise ModelError(
            f"a {type(host).__name__} shows no attention of its blocks; tokens are pruned in PyTorch models of "
            "transformers"
        )
    if host.example is None:
        raise ModelError("the model needs an example batch: secateur.open(model, example=batch)")
    copy = host.copy()
    remove(copy.model)
    return find_sites(copy.model, host.layout, without_labels(by_name(copy.model, host.example)))


def _with_schedule(host: TorchHost, schedule: TokenSchedule, found: Found) -> TorchHost:
    copy = host.copy()
    install(copy.model, schedule, found.sites)
    attach(copy.model)
    return copy
