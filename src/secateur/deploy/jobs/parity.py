"""Parity: an exported program against PyTorch on the same inputs, at several shapes."""

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
"""Largest permitted relative error of 8-bit weights, which round; look at the agreement, too."""


def compare(
    model: nn.Module, program: runner.Program, batches: Iterable[Mapping[str, Any]], tolerance: float
) -> Parity:
    """Run both on every batch; padded positions do not count. DeployError when they differ by more than `tolerance`."""
    found = Comparison()
    for batch in batches:
        feed = {k: torch.as_tensor(v) for k, v in batch.items()}
        with evaluating(model), torch.no_grad():
            expected = inputs.named_outputs(model, feed)
        got = program({k: v.numpy() for k, v in feed.items()})
        found.ran(inputs.shapes_of(feed), len(next(iter(feed.values()))))
        mask = to_numpy(feed["attention_mask"]).astype(bool) if "attention_mask" in feed else None
        for name, tensor in expected.items():
            if not tensor.is_floating_point():
                continue
            a, b = to_numpy(tensor), got.get(name)
            if b is None or a.shape != b.shape:
                raise DeployError(f"the program gives {name} as {None if b is None else b.shape}, PyTorch as {a.shape}")
            if mask is not None and a.ndim > 2 and a.shape[:2] == mask.shape:
                a, b = a[mask], b[mask]
            found.add(name, a, b, ranked=name == "logits")
    return found.parity(tolerance, "PyTorch", DeployError)


def batches(
    model: nn.Module, tokenizer: Any, data: Any, target: Target, ports: Sequence[Port], length: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches for a comparison: rows of text tokenised, batches as they are, or made up where there is no data."""
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
        given = {k: v for k, v in without_labels(with_decoder_inputs(model, batch)).items() if k in names}
        if "decoder_input_ids" in names and "decoder_input_ids" not in given:
            most = next((p.at_most.get(1) for p in ports if p.name == "decoder_input_ids"), None)
            given["decoder_input_ids"] = next(iter(given.values()))[:, :most]
        yield {port.name: given[port.name] for port in ports if port.name in given}


def made_up(target: Target, ports: Sequence[Port]) -> Iterator[dict[str, torch.Tensor]]:
    """Random inputs at three shapes, or at the one that the target has."""
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
    most = tokens.at_most.get(1) or (tokens.shape[1] if isinstance(tokens.shape[1], int) else None)
    positions = inputs.positions_of(model)
    longest = min(n for n in (most, positions, length or 128) if n is not None)
    features = encode(model, tokenizer, Rows(rows.texts), longest)
    features.sort(key=lambda feature: len(feature["input_ids"]))
    fixed = target.shapes == "fixed"
    start = count = 0
    while start < len(features):
        size = BATCHES[count % len(BATCHES)] if not isinstance(tokens.shape[0], int) else tokens.shape[0]
        part = features[start : start + min(size, tokens.at_most.get(0, size))]
        start, count = start + len(part), count + 1
        if fixed:
            part = [part[i % len(part)] for i in range(size)]
        options: dict[str, Any] = {"padding": "max_length", "max_length": most} if fixed else {"padding": True}
        yield dict(tokenizer.pad(part, return_tensors="pt", **options))
