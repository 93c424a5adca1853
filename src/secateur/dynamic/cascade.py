"""A self-cascade: the pass with fewer tokens answers where it is sure; the other rows get the full pass of the same
weights. It is the safe mode of token pruning: agreement with the full pass is certified, at the price of some time.

Confidence is the largest softmax probability, of the pruned pass. No label is ever needed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.dynamic.certificate import certified_threshold, check_wanted
from secateur.errors import DataError, ModelError
from secateur.torch.base.batches import by_name, evaluating, run, to_device, without_labels
from secateur.torch.tokens.install import all_tokens, tokens_of


@dataclass(frozen=True)
class Answer:
    """What a model with a cheap and a full way to answer gives.

    logits: (rows, classes). escalated: (rows,) True where they come from the full pass.
    """

    logits: torch.Tensor
    escalated: torch.Tensor


@dataclass(frozen=True)
class Cascade:
    """A threshold on the confidence of the pruned pass, and what calibration rows say of it.

    threshold: rows whose confidence is below it get the full pass.
    escalated: the share of the calibration rows that do.
    agreement: the share of them whose answer is that of the full pass.
    rows: how many there were.
    wanted: the agreement that is certified for rows drawn like these, and `sure` the probability that the certificate
        is right; None for a threshold that was chosen by the share of escalated rows.
    """

    threshold: float
    escalated: float
    agreement: float
    rows: int
    wanted: float | None = None
    sure: float | None = None

    def __str__(self) -> str:
        certified = "nothing is certified"
        if self.wanted is not None and self.sure is not None:
            certified = f"at least {100 * self.wanted:g}% is certified with a probability of {100 * self.sure:g}%"
        return (
            f"{100 * self.escalated:.1f}% of {self.rows} rows get the full pass; {100 * self.agreement:.1f}% are "
            f"answered as by it, {certified}"
        )

    def run(self, model: nn.Module, batch: Any) -> Answer:
        """The answers of a model to a batch; see `answer`."""
        return answer(model, batch, self.threshold)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `artefact.json`; what is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def calibrate(
    host: Any,
    batches: Iterable[Any],
    agreement: float = 0.99,
    sure: float = 0.95,
    *,
    escalate: float | None = None,
) -> Cascade:
    """The lowest threshold that certifies an agreement with the full pass.

    host: of `secateur.dynamic.prune_tokens`, or a PyTorch model that has a schedule of tokens.
    batches: inputs like those to come, padded as those will be: what is pruned is a share of the padded length. Labels
        are ignored. 99% with a probability of 95% takes at least 299 rows.
    agreement: the share of rows that must get the class of the full pass. sure: the probability, over the draw of
        the rows, that at least that share of all rows to come does.
    escalate: instead, the share of the rows that get the full pass; nothing is certified then.

    Raises ModelError for a model without a schedule, or one that does not choose one of several classes; DataError for
    too few rows.
    """
    model = scheduled(host)
    check_wanted(agreement, sure)
    if escalate is not None and not 0 <= escalate <= 1:
        raise DataError(f"escalate {escalate:g} is no share of rows; give one from 0 to 1")
    found, agrees = [], []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            given = plain_inputs(model, batch)
            pruned = logits_of(model, given)
            with all_tokens():
                full = logits_of(model, given)
            found.append(confidence_of(pruned).cpu().numpy())
            agrees.append((pruned.argmax(1) == full.argmax(1)).cpu().numpy())
    if not found:
        raise DataError("there are no rows to calibrate on; give batches")
    confidence, same = np.concatenate(found), np.concatenate(agrees)
    if escalate is None:
        threshold = certified_threshold(confidence, same, agreement, sure)
    else:
        threshold = quantile(confidence, escalate)
    unsure = confidence < threshold
    escalated, agreed = float(unsure.mean()), float((same | unsure).mean())
    if escalate is not None:
        return Cascade(threshold, escalated, agreed, len(same))
    return Cascade(threshold, escalated, agreed, len(same), wanted=agreement, sure=sure)


def answer(model: nn.Module, batch: Any, threshold: float) -> Answer:
    """The answers of a model with a schedule of tokens, and of its full pass for the rows that it is not sure of.

    batch: inputs in any form that the model takes, of any number of rows; labels are ignored. The rows that get the
    full pass are those of a smaller batch, with the padding of the whole one.

    Nothing is kept in the model, and threads may share it. Raises ModelError for a model in training mode, whose
    answers are random, and for one without a schedule.
    """
    scheduled(model)
    if model.training:
        raise ModelError("the model is in training mode, in which its confidence is random; call model.eval() first")
    with torch.no_grad():
        given = plain_inputs(model, batch)
        logits = logits_of(model, given)
        unsure = confidence_of(logits) < threshold
        chosen = unsure.nonzero()[:, 0]
        if len(chosen):
            with all_tokens():
                full = logits_of(model, rows_of(given, chosen, len(logits)))
            logits = logits.index_copy(0, chosen, full)
    return Answer(logits, unsure)


def scheduled(source: Any) -> nn.Module:
    """The model of a host, or the model itself; ModelError where it has no schedule of tokens."""
    model = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    if not isinstance(model, nn.Module) or tokens_of(model) is None:
        raise ModelError(
            "a cascade needs a model with a schedule of tokens, and this one has none; make it with `secateur prune "
            "--tokens` or secateur.dynamic.prune_tokens"
        )
    return model


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """(rows,) the largest softmax probability, in float64: in float32 all sure rows have the confidence 1."""
    return 1 / (logits.double() - logits.double().amax(1, keepdim=True)).exp().sum(1)


def quantile(confidence: np.ndarray, share: float) -> float:
    """A threshold below which that share of the confidences lies, rounded to rows; equal ones stay together above."""
    ordered = np.sort(confidence)
    count = math.floor(share * len(ordered) + 0.5)
    if count == 0:
        return 0.0
    if count == len(ordered):
        return 2.0  # above any confidence
    return float(ordered[count - 1] + ordered[count]) / 2


def logits_of(model: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """(rows, classes) of a forward pass; ModelError for outputs that do not choose one of several classes."""
    output = run(model, given)
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] < 2 or kind in _NOT_ONE_OF_SEVERAL:
        shape = f"of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"confidence is that of one class among several, and a {type(model).__name__} gives outputs {shape}"
            f"{f' for {kind}' if kind else ''}; use a classifier"
        )
    return logits


_NOT_ONE_OF_SEVERAL = ("multi_label_classification", "regression")


def rows_of(given: Mapping[str, Any], chosen: torch.Tensor, rows: int) -> dict[str, Any]:
    """The chosen rows of a batch of that many rows; what has no rows is the same for all."""
    return {
        name: value[chosen] if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows else value
        for name, value in given.items()
    }


def plain_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch by the names that the model gives its inputs, on its device, without labels."""
    return dict(without_labels(by_name(model, to_device(batch, model))))
