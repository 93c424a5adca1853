"""The entry `tokens` of a saved model's manifest: its schedule of tokens, and where the hooks are that keep to it."""

from typing import Any

from torch import nn

from secateur.schemas.model_folder import REMEDY, TokensEntry
from secateur.schemas.reading import check
from secateur.token_schedule import TokenSchedule
from secateur.torch.tokens.install import install, tokens_of
from secateur.torch.tokens.sites import TokenSites


def entry_of(model: nn.Module) -> dict[str, Any] | None:
    """The entry for a model as plain JSON; None for a model without a schedule."""
    installed = tokens_of(model)
    if installed is None:
        return None
    return {"schedule": installed.schedule.to_json(), "sites": installed.sites.to_json()}


def read_entry(data: Any) -> tuple[TokenSchedule, TokenSites]:
    """What `entry_of` wrote; ModelError for anything else."""
    entry = check(data, TokensEntry, "the manifest's 'tokens'", remedy=REMEDY)
    return TokenSchedule.from_json(entry.schedule), TokenSites.from_json(entry.sites)


def install_entry(model: nn.Module, data: Any) -> None:
    """Give a model the schedule of an entry, in place; None changes nothing.

    Raises ModelError for a damaged entry, and for one that does not fit the model.
    """
    if data is not None:
        install(model, *read_entry(data))
