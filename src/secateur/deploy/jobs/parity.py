"""Compares an exported program with PyTorch on the same inputs, at several shapes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.deploy import runner
from secateur.deploy.jobs.comparison import Comparison
from secateur.deploy.jobs.material import Material
from secateur.deploy.jobs.results import Parity
from secateur.deploy.target import DeployError, Port, Target
from secateur.deploy.targets import inputs
from secateur.torch.base.batches import evaluating

INT8_TOLERANCE = 0.25
"""Largest permitted relative error of 8-bit weights, which round; the agreement says more about them."""

RANKED = ("logits", "start_logits", "end_logits")
"""Outputs in which the largest of the last axis is an answer."""


def compare(
    model: nn.Module, program: runner.Program, batches: Iterable[Mapping[str, Any]], tolerance: float
) -> Parity:
    """Run both on every batch, padded positions left out.

    Raises DeployError for a relative error of more than `tolerance`, and for other outputs or other shapes.
    """
    comparison = Comparison("PyTorch", DeployError)
    for batch in batches:
        feed = {k: torch.as_tensor(v) for k, v in batch.items()}
        with evaluating(model), torch.no_grad():
            expected = {name: to_numpy(x) for name, x in inputs.named_outputs(model, feed).items()}
        got = program({k: v.numpy() for k, v in feed.items()})
        comparison.ran(inputs.shapes_of(feed), len(next(iter(feed.values()))))
        mask = to_numpy(feed["attention_mask"]).astype(bool) if "attention_mask" in feed else None
        comparison.add(expected, got, ranked=[name for name in expected if name in RANKED], mask=mask)
    return comparison.parity(tolerance)


def batches(
    model: nn.Module, material: Material | None, target: Target, ports: Sequence[Port]
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for a comparison: the user's, or made-up ones where there is no data."""
    for feed in made_up(target, ports) if material is None else material.batches(target, ports):
        given = dict(feed)
        if any(port.name == "decoder_input_ids" for port in ports):
            given.setdefault("decoder_input_ids", _decoder_ids(model, feed, ports))
        yield {port.name: _fitted(given[port.name], port) for port in ports if port.name in given}


def _decoder_ids(model: nn.Module, feed: Mapping[str, torch.Tensor], ports: Sequence[Port]) -> torch.Tensor:
    """Ids for a decoder where the data gives none: those of the encoder, or the start token for sounds and images."""
    port = next(p for p in ports if p.name == "decoder_input_ids")
    width = port.shape[1] if isinstance(port.shape[1], int) else port.at_most.get(1)
    first = next(iter(feed.values()))
    if not first.is_floating_point():
        return first[:, :width]
    config: Any = getattr(model, "config", None)
    start = getattr(config, "decoder_start_token_id", None) or 0
    return torch.full((len(first), width or inputs.SYMBOLS["target"]), start)


def _fitted(value: torch.Tensor, port: Port) -> torch.Tensor:
    """Sounds for a program of one length: cut, or filled up with zeros, in the second dimension."""
    wanted = port.shape[1] if port.usual else None
    if not isinstance(wanted, int) or value.shape[1] == wanted:
        return value
    filled = value.new_zeros(value.shape[0], wanted, *value.shape[2:])
    most = min(wanted, value.shape[1])
    filled[:, :most] = value[:, :most]
    return filled


def made_up(target: Target, ports: Sequence[Port]) -> Iterator[dict[str, torch.Tensor]]:
    """Random inputs at three shapes, or at the only one of the target."""
    sizes = [dict(inputs.SYMBOLS), {"batch": 1, "length": 5, "target": 3}, {"batch": 4, "length": 16, "target": 9}]
    usual = max((port.usual for port in ports), default=0)
    for factor, size in zip((1, 1.5, 1.25), sizes, strict=True):
        size["samples"] = round(factor * usual)
    for seed, size in enumerate(sizes if target.shapes != "fixed" else sizes[:1]):
        yield inputs.tensors(list(ports), size, seed)
