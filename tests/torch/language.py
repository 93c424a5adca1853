"""What tests of pruning block by block share: windows, recipes, folders compared, and runs that stop."""

import torch

from secateur.card.write import NAME as CARD
from secateur.recipe import make_recipe
from secateur.record import NAME as RECORD
from secateur.torch.files.hashes import HASHES
from tests import zoo


def windows(count=6, context=16, seed=0):
    """Random calibration windows."""
    return torch.randint(3, zoo.VOCAB, (count, context), generator=torch.Generator().manual_seed(seed))


def files(folder):
    """Every file under a folder and its bytes, but the record and the card, which have a date, and the hashes."""
    found = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if p.name not in (RECORD, CARD, HASHES)}


def recipe(**values):
    """SparseGPT 2:4 on windows like those above."""
    return make_recipe(**{"criterion": "sparsegpt", "pattern": "2:4", "samples": 6, "context": 16, **values})


def same(model, folder):
    """Whether a folder loads to the weights of a model, to the last bit."""
    again = type(model).from_pretrained(folder).state_dict()
    return again.keys() == model.state_dict().keys() and all(
        torch.equal(value, again[name]) for name, value in model.state_dict().items()
    )


class Stop(Exception):
    """What stops a run in a test."""


def stopped_after(number):
    """A progress that raises Stop when so many blocks are done."""

    def progress(done):
        if done.number == number:
            raise Stop

    return progress
