"""Search rows: how many of them tell single layers apart."""

from types import SimpleNamespace

import pytest

from secateur.search.rows import few_batches, search_batches
from secateur.tasks.base.task import Examples


class Counting:
    """A task whose rows have so many decisions each."""

    def __init__(self, decisions):
        self.each = decisions

    def decisions(self, batch):
        return self.each * len(batch)

    def collate(self, features):
        return features

    def length(self, feature):
        return 1

    def largest_batch(self, features):
        return None


def examples(rows):
    return Examples([SimpleNamespace()] * rows, range(rows), None, rows)


@pytest.mark.parametrize(
    ("decisions", "rows", "batch_size", "kept", "size", "few"),
    [
        (1, 1000, 32, 1000, 32, 6),
        (1, 100, 32, 100, 32, 4),
        (127, 40, 32, 16, 2, 1),
        (511, 40, 32, 4, 1, 1),
        (63, 40, 2, 32, 2, 2),
    ],
    ids=["classes", "few-rows", "windows", "long-windows", "small-batches"],
)
def test_rows_with_many_decisions_do_in_smaller_number(decisions, rows, batch_size, kept, size, few):
    task = Counting(decisions)
    batches = search_batches(task, examples(rows), batch_size)
    assert len(batches.examples.features) == kept
    assert batches.batch_size == size
    assert few_batches(task, batches) == few
