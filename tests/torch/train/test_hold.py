import pytest
import torch
from torch import nn

from secateur.torch.train.hold import hold, zero


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    masks = {"0.weight": torch.rand(16, 8) > 0.8, "2.weight": torch.rand(2, 16) > 0.5, "0.bias": torch.rand(16) > 0.3}
    return model, masks


def zeros_are_exactly(model, masks):
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_after_200_steps_are_exactly_the_planned_set(optimizer):
    model, masks = make()
    parameters = dict(model.named_parameters())
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    with hold(parameters, masks):
        for _ in range(200):
            for _ in range(3):  # gradient accumulation
                model(torch.randn(4, 8)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    zeros_are_exactly(model, masks)


def test_an_optimizer_with_a_history_cannot_revive_weights():
    model, masks = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    with hold(dict(model.named_parameters()), masks):
        for _ in range(3):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            zeros_are_exactly(model, masks)


def test_removed_weights_do_not_count_in_clipping():
    model, masks = make()
    with hold(dict(model.named_parameters()), masks):
        model(torch.randn(4, 8)).square().mean().backward()
        assert not model.get_parameter("0.weight").grad[~masks["0.weight"]].any()


def test_nothing_is_left_behind():
    model, masks = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="stop"), hold(dict(model.named_parameters()), masks):
        raise RuntimeError("stop")
    zeros_are_exactly(model, masks)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert (model.get_parameter("0.weight")[~masks["0.weight"]] != 0).any()


def test_two_models_are_held_at_once():
    (a, masks), (b, other) = make(0), make(1)
    optimizer = torch.optim.AdamW([*a.parameters(), *b.parameters()], lr=0.1)
    with hold(dict(a.named_parameters()), masks), hold(dict(b.named_parameters()), other):
        for _ in range(5):
            (a(torch.randn(4, 8)) - b(torch.randn(4, 8))).square().mean().backward()
            optimizer.step()
    zeros_are_exactly(a, masks)
    zeros_are_exactly(b, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_clears_what_it_is_told_to_and_nothing_else(dtype):
    values = torch.randn(6, 5, dtype=torch.float64).to(dtype).t()  # not contiguous
    values[0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, float("nan")], dtype=dtype)
    gone = torch.rand(5, 6) < 0.5
    gone[0, :4] = torch.tensor([True, True, True, False])
    wanted = values.clone().masked_fill_(gone, 0)
    zero(values, gone)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(values.view(bits), wanted.view(bits))  # every bit: +0, and NaN that stays
