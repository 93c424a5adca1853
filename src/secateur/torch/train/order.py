"""The order of the rows in training: a function of the seed and the epoch, whatever else is random.

So an interrupted training goes on with the rows that were next, and several processes share the batches of one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class Order(Sampler[int]):
    """Rows in random order, another in each epoch.

    lengths: of each row; batches then hold rows of like lengths. None: any order.
    together: how many rows make one step, on all processes.
    """

    def __init__(self, rows: int, seed: int, lengths: Sequence[int] | None = None, together: int = 1) -> None:
        self._rows, self._seed, self._lengths, self._together = rows, seed, lengths, together
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins; the Trainer does."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed + 1_000_003 * self._epoch) % 2**63)
        if self._lengths is None:
            return iter(torch.randperm(self._rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self._lengths, self._together, generator=generator))
