import itertools

import pytest
import torch

from secateur.torch.train.order import Order


def order_of(order, epoch):
    order.set_epoch(epoch)
    return list(order)


@pytest.mark.parametrize("lengths", [None, [row % 7 for row in range(40)]])
def test_the_order_is_a_function_of_seed_and_epoch(lengths):
    first = Order(40, 3, lengths, 4)
    torch.manual_seed(1)
    orders = [order_of(first, epoch) for epoch in (0, 1, 2)]
    torch.manual_seed(2)  # what else is random does not matter, nor which epochs came before
    assert order_of(Order(40, 3, lengths, 4), 2) == orders[2]
    assert order_of(Order(40, 4, lengths, 4), 2) != orders[2]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len(first) == 40


def test_rows_of_like_lengths_are_neighbours():
    lengths = [row % 10 for row in range(80)]
    random, grouped = list(Order(80, 0)), list(Order(80, 0, lengths, 4))

    def jumps(order):
        return sum(abs(lengths[a] - lengths[b]) for a, b in itertools.pairwise(order))

    assert jumps(grouped) < jumps(random) / 2
