"""One early exit: after some block a linear head reads the first token, and answers where it is sure.

It is an alternative to token pruning, for batch 1: rows of a batch leave a model together, so that a batch is stopped
early only where all of its rows are sure. The two hardly add up. The head is a ridge regression, in closed form, of the
whole model's logits on the normalised state of the first token; no weight of the model changes, and no label is
needed. Early exits: BranchyNet (Teerapittayanon et al., 2016), DeeBERT (Xin et al., 2020).
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.dynamic.cascade import Answer, confidence_of, logits_of, plain_inputs
from secateur.dynamic.certificate import certified_threshold, check_wanted, rows_needed
from secateur.errors import DataError, ModelError
from secateur.torch.base.batches import evaluating
from secateur.torch.base.manifest import submodule
from secateur.torch.blockwise.block_calls import chains
from secateur.torch.tokens.install import first_of, tokens_of

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties that are tried, in units of the variance of a feature."""
FOLDS = 5
LEAST_ROWS = 4 * FOLDS


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """A head after a block, and what rows say of it.

    stack: path of the module list that holds the blocks; block: how many of its `blocks` run before the head.
    weight, bias: (classes, features) and (classes,) of the head.
    threshold: rows whose confidence is below it go on through the other blocks.
    escalated: the share of the certifying rows that do. agreement: the share answered as by the whole model.
    rows: how many there were. wanted, sure: what they certify, as for `secateur.dynamic.Cascade`.
    """

    stack: str
    block: int
    blocks: int
    weight: np.ndarray
    bias: np.ndarray
    threshold: float
    escalated: float
    agreement: float
    rows: int
    wanted: float
    sure: float

    @property
    def work(self) -> float:
        """The mean share of the blocks that run for a row, in batches of one."""
        return _work(self.block, self.blocks, self.escalated)

    @property
    def path(self) -> str:
        """The path of the last block before the head."""
        return f"{self.stack}.{self.block - 1}"

    def __str__(self) -> str:
        return (
            f"{100 * (1 - self.escalated):.1f}% of {self.rows} rows leave after block {self.block} of {self.blocks}; "
            f"{100 * self.agreement:.1f}% are answered as by the whole model, at least {100 * self.wanted:g}% is "
            f"certified with a probability of {100 * self.sure:g}%"
        )

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (rows, classes) from the states of the tokens (rows, tokens, features)."""
        weight, bias = (torch.from_numpy(x).to(states) for x in (self.weight, self.bias))
        return nn.functional.linear(states[:, 0], weight, bias)

    def run(self, model: nn.Module, batch: Any) -> Answer:
        """The answers to a batch: the head's for rows that it is sure of, else the whole model's (`escalated`).

        Where all rows are sure the model stops after the block. Threads may share the model: the hook that stops it
        stays for this call, and knows its thread. Raises ModelError for a model in training mode.
        """
        if model.training:
            raise ModelError(
                "the model is in training mode, in which its confidence is random; call model.eval() first"
            )
        with torch.no_grad(), _stopping(model, self) as seen:
            try:
                full = logits_of(model, plain_inputs(model, batch))
            except _AllSure as stop:
                return Answer(stop.logits, torch.zeros(len(stop.logits), dtype=torch.bool, device=stop.logits.device))
        logits, unsure = seen[0]
        return Answer(torch.where(unsure[:, None], full, logits.to(full)), unsure)


class _AllSure(Exception):
    """Ends a run of the model at the block after which all rows are answered."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits


_hooks = threading.Lock()
"""Held while a hook comes or goes: torch numbers hooks without one, and two threads could get the same number."""


@contextlib.contextmanager
def _stopping(model: nn.Module, leave: EarlyExit) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """A context in which runs of this thread stop at the head, or note its logits and which rows are unsure."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    thread = threading.get_ident()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        logits = leave.head(first_of(output))
        unsure = confidence_of(logits) < leave.threshold
        if not bool(unsure.any()):
            raise _AllSure(logits)
        seen.append((logits, unsure))

    with _hooks:
        handle = submodule(model, leave.path).register_forward_hook(look)
    try:
        yield seen
    finally:
        with _hooks:
            handle.remove()


def fit_exit(
    host: Any, batches: Iterable[Any], agreement: float = 0.99, sure: float = 0.95, *, seed: int = 0
) -> EarlyExit:
    """The early exit with the least expected work that certifies an agreement with the whole model.

    host: of `secateur.open`, of a classifier whose head reads the first token.
    batches: inputs like those to come; labels are ignored. One half of the rows, drawn by `seed`, fits the heads and
        chooses the block; the other half certifies that head alone. So 99% with 95% takes at least 598 rows.
    agreement, sure: as for `secateur.dynamic.calibrate`.

    Raises ModelError where no exit saves work, for a model with a schedule of tokens, and for one that has several
    stacks of blocks or does not choose one of several classes; DataError for too few rows.
    """
    check_wanted(agreement, sure)
    model = host.model
    if tokens_of(model) is not None:
        raise ModelError("the model has a schedule of tokens, to which an exit adds hardly anything; use one of them")
    stacks = chains(host.layout)
    if len(stacks) > 1:
        raise ModelError(f"the model has the stacks {', '.join(stacks)}; an exit is for a model with one stack")
    stack, paths = next(iter(stacks.items()))
    states, logits = _collect(model, paths, batches)
    rows = np.random.default_rng(seed).permutation(len(logits))
    least = 2 * max(LEAST_ROWS, rows_needed(agreement, sure))
    if len(rows) < least:
        raise DataError(
            f"{len(rows)} rows cannot certify an exit at {100 * agreement:g}% agreement with a probability of "
            f"{100 * sure:g}%: it takes {least} rows, half of which fit the head; give more, or ask for less"
        )
    fitting, fresh = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    block, ridge = _choose(states, logits, fitting, agreement, sure)
    weight, bias = _ridge(states[block - 1][fitting], logits[fitting], [ridge])[0]
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    confidence, agrees = _judge(states[block - 1][fresh] @ weight.T.astype(float) + bias, logits[fresh])
    threshold = certified_threshold(confidence, agrees, agreement, sure)
    unsure = confidence < threshold
    share, agreed = float(unsure.mean()), float((agrees | unsure).mean())
    return EarlyExit(
        stack, block, len(paths), weight, bias, threshold, share, agreed, len(fresh), wanted=agreement, sure=sure
    )


def _work(block: int, blocks: int, escalated: float) -> float:
    return (block + (blocks - block) * escalated) / blocks


def _collect(model: nn.Module, paths: list[str], batches: Iterable[Any]) -> tuple[list[np.ndarray], np.ndarray]:
    """States of the first token after each block but the last, (rows, features) each, and the logits of the model."""
    states: dict[str, list[np.ndarray]] = {path: [] for path in paths[:-1]}
    logits = []

    def note(path: str) -> Any:
        return lambda module, args, output: states[path].append(to_numpy(first_of(output)[:, 0].double()))

    with evaluating(model), torch.no_grad(), contextlib.ExitStack() as stack:
        for path in states:
            stack.callback(submodule(model, path).register_forward_hook(note(path)).remove)
        for batch in batches:
            logits.append(to_numpy(logits_of(model, plain_inputs(model, batch)).double()))
    if not logits or not states:
        raise DataError("an exit needs rows, and a model of two blocks at least")
    return [np.concatenate(found) for found in states.values()], np.concatenate(logits)


def _choose(
    states: list[np.ndarray], logits: np.ndarray, fitting: np.ndarray, agreement: float, sure: float
) -> tuple[int, float]:
    """How many blocks run before the exit with the least expected work, and the penalty of its head.

    Judged by cross-validation: every row by a head that was fitted without it.
    """
    best, why = (1.0, 0, 0.0), ""
    for block, features in enumerate(states, 1):
        ridge, predicted = _cross_validated(features[fitting], logits[fitting])
        confidence, agrees = _judge(predicted, logits[fitting])
        try:
            threshold = certified_threshold(confidence, agrees, agreement, sure)
        except ModelError as error:
            why = f" ({error})"
            continue
        work = _work(block, len(states) + 1, float((confidence < threshold).mean()))
        best = min(best, (work, block, ridge))
    if not best[1]:
        raise ModelError(f"no early exit saves work at {100 * agreement:g}% agreement{why}; use token pruning")
    return best[1], best[2]


def _cross_validated(features: np.ndarray, logits: np.ndarray) -> tuple[float, np.ndarray]:
    """The penalty with the least squared error on rows left out, and the logits that its heads give for these."""
    folds = np.arange(len(logits)) % FOLDS
    predicted = np.zeros((len(RIDGES), *logits.shape))
    for fold in range(FOLDS):
        out = folds == fold
        for number, (weight, bias) in enumerate(_ridge(features[~out], logits[~out], RIDGES)):
            predicted[number, out] = features[out] @ weight.T + bias
    errors = ((predicted - _centred(logits)) ** 2).sum((1, 2))
    best = int(errors.argmin())
    return RIDGES[best], predicted[best]


def _ridge(features: np.ndarray, logits: np.ndarray, ridges: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each penalty the weight (classes, features) and bias (classes,) of a head, on features as they are.

    They are normalised to variance 1 inside; the logits are centred, as adding a number to all changes no answer.
    """
    mean, spread = features.mean(0), features.std(0)
    spread = np.maximum(spread, 1e-6 * max(float(spread.max()), 1e-12))
    inputs, targets = (features - mean) / spread, _centred(logits)
    middle = targets.mean(0)
    values, vectors = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    projected = vectors.T @ (inputs.T @ (targets - middle) / len(inputs))
    found = []
    for ridge in ridges:
        weight = (vectors @ (projected / (values.clip(0) + ridge)[:, None])).T / spread
        found.append((weight, middle - weight @ mean))
    return found


def _centred(logits: np.ndarray) -> np.ndarray:
    return logits - logits.mean(1, keepdims=True)


def _judge(predicted: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) confidence of predicted logits, and whether their answer is that of the model's logits."""
    confidence = confidence_of(torch.from_numpy(predicted)).numpy()
    return confidence, predicted.argmax(1) == logits.argmax(1)
