"""Compares an exported program with PyTorch on the same inputs, at several shapes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.deploy import runner
from secateur.deploy.jobs.comparison import Comparison
from secateur.deploy.jobs.results import BATCHES, Parity
from secateur.deploy.target import DeployError, Port, Target
from secateur.deploy.targets import inputs
from secateur.labelled_rows import Rows
from secateur.torch.base.batches import evaluating, with_decoder_inputs, without_labels
from secateur.torch.data.text_rows import encode

INT8_TOLERANCE = 0.25
"""Largest permitted relative error of 8-bit weights, which round; the agreement says more about them."""


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
        comparison.add(expected, got, ranked=[name for name in expected if name == "logits"], mask=mask)
    return comparison.parity(tolerance)


def batches(
    model: nn.Module, tokenizer: Any, data: Any, target: Target, ports: Sequence[Port], length: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for a comparison: tokenised rows of text, the user's batches, or made-up ones where there is no data."""
    if isinstance(data, Rows):
        if tokenizer is None:
            raise DeployError("texts need a tokenizer, and none lies beside the model; pass batches of tensors")
        data = texts(model, tokenizer, data, target, ports, length)
    if data is None:
        data = made_up(target, ports)
    names = {port.name for port in ports}
    for batch in data:
        if not isinstance(batch, Mapping):
            raise DeployError(f"a batch is a mapping of input names to tensors, not a {type(batch).__name__}")
        feed = {k: v for k, v in without_labels(with_decoder_inputs(model, batch)).items() if k in names}
        if "decoder_input_ids" in names and "decoder_input_ids" not in feed:
            most = next((p.at_most.get(1) for p in ports if p.name == "decoder_input_ids"), None)
            feed["decoder_input_ids"] = next(iter(feed.values()))[:, :most]
        yield {port.name: feed[port.name] for port in ports if port.name in feed}


def made_up(target: Target, ports: Sequence[Port]) -> Iterator[dict[str, torch.Tensor]]:
    """Random inputs at three shapes, or at the only one of the target."""
    sizes = [dict(inputs.SYMBOLS), {"batch": 1, "length": 5, "target": 3}, {"batch": 4, "length": 16, "target": 9}]
    for seed, size in enumerate(sizes if target.shapes != "fixed" else sizes[:1]):
        yield inputs.tensors(list(ports), size, seed)


def texts(
    model: nn.Module, tokenizer: Any, rows: Rows, target: Target, ports: Sequence[Port], length: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Rows in batches of several sizes; for a target of one shape padded to it, the last batch filled up."""
    tokens = next((port for port in ports if len(port.shape) == 2 and port.fill == "ids"), None)
    if tokens is None:
        raise DeployError(f"{type(model).__name__} takes no text; leave the data out, or pass batches of tensors")
    batch, width = tokens.shape
    most = tokens.at_most.get(1) or (width if isinstance(width, int) else None)
    limits = (most, inputs.positions_of(model), length or 128)
    features = encode(model, tokenizer, Rows(rows.texts), min(n for n in limits if n is not None))
    features.sort(key=lambda feature: len(feature["input_ids"]))
    fixed = target.shapes == "fixed"
    padding: dict[str, Any] = {"padding": "max_length", "max_length": most} if fixed else {"padding": True}
    start = 0
    for size in itertools.cycle([batch] if isinstance(batch, int) else BATCHES):
        part = features[start : start + min(size, tokens.at_most.get(0, size))]
        if not part:
            return
        start += len(part)
        if fixed:
            part = [part[i % len(part)] for i in range(size)]
        yield dict(tokenizer.pad(part, return_tensors="pt", **padding))
