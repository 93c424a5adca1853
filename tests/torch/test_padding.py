"""Which rows count where linear layers read: by position or by name, flattened, and in encoder-decoders."""

import pytest
import torch
from torch import nn

import secateur
from secateur import Element, criteria
from secateur.repair import sparsegpt


class ByName(nn.Module):
    """A module that names the input of its linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.down(input=torch.relu(self.up(input=x)))


@pytest.mark.parametrize("options", [{"criterion": criteria.wanda}, {"repair": sparsegpt}])
def test_inputs_given_by_name_are_seen(options):
    torch.manual_seed(0)
    x = torch.rand(5, 8)
    host = secateur.open(ByName(), example=(x,))
    stats = host.collect(["act_sq", "gram"], [(x,)])
    torch.testing.assert_close(stats.mean("act_sq", "up.weight"), x.square().mean(0))
    torch.testing.assert_close(stats.mean("gram", "up.weight"), x.T @ x / 5)
    plan = secateur.prune(host, pattern=Element(), budget=0.5, data=[(x,)], **options)
    assert plan.masks["down.weight"].sum() == 32
