"""Cascades on a runtime: an artefact of two graphs, of which the second answers where the first is not sure.

A model that prunes tokens becomes "model", its pruned pass, and "full", the pass on all tokens. A model with an early
exit becomes "model", the blocks before it and its head, and "rest". Both have the same weights, or parts of them: ONNX
programs store them once, OpenVINO's each their own.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.arrays import to_numpy
from secateur.deploy import runner
from secateur.deploy.jobs import parity
from secateur.deploy.jobs.material import Material
from secateur.deploy.jobs.results import Parity
from secateur.deploy.onnx_graph.shared import share
from secateur.deploy.operator_library import installed_library
from secateur.deploy.target import DeployError, ExportUnit, Port, Target, Written, translated
from secateur.dynamic.cascade import Cascade, calibrate, scheduled
from secateur.dynamic.exit_parts import STATES, parts_of
from secateur.dynamic.exits import EarlyExit
from secateur.torch.tokens.install import remove

Decision = Cascade | EarlyExit
NEAR = 1e-3
"""How close to the threshold a confidence may be that a runtime's rounding puts on its other side."""


def check(target: Target, options: Any) -> None:
    """DeployError for a target or for export options that a cascade does not go with."""
    if not target.generates:
        raise DeployError(f"{target.name} gets no cascade here, which has two programs; use onnx or openvino")
    for name in ("generate", "int8", "sparse"):
        if getattr(options, name):
            raise DeployError(f"a cascade is certified for the weights of the model; leave out {name}")


def decided(
    model: nn.Module, wanted: float | Decision, rows: Material | None, target: Target, ports: list[Port]
) -> Decision:
    """A cascade or exit as it is; for an agreement that is wanted, the cascade that certifies it on the rows."""
    if isinstance(wanted, EarlyExit):
        return wanted
    scheduled(model)
    if isinstance(wanted, Cascade):
        return wanted
    if rows is None:
        raise DeployError("rows must certify the agreement of a cascade; give data, which needs no labels")
    return calibrate(model, rows.batches(target, ports), wanted)


def graphs_of(
    model: nn.Module, decision: Decision, inputs: Mapping[str, torch.Tensor], ports: list[Port]
) -> dict[str, ExportUnit]:
    """The two graphs, with tensors to trace them."""
    if isinstance(decision, Cascade):
        return {"model": ExportUnit(model, inputs, ports), "full": ExportUnit(on_all_tokens(model), inputs, ports)}
    first, rest = parts_of(model, decision, dict(inputs))
    states = states_of(first, inputs)
    tokens = next((port for port in ports if port.fill == "ids" and "length" in port.shape), None)
    length = "length" if tokens is not None else int(states.shape[1])
    port = Port(STATES, "float32", ("batch", length, int(states.shape[2])), "normal")
    return {
        "model": ExportUnit(first, inputs, ports),
        "rest": ExportUnit(rest, {**inputs, STATES: states}, [*ports, port]),
    }


def states_of(first: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the blocks before an exit give to the rest."""
    with torch.no_grad():
        states: torch.Tensor = first(**inputs)[STATES]
    return states


def on_all_tokens(model: nn.Module) -> nn.Module:
    """A copy of the model without its schedule of tokens, which shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    found = copy.deepcopy(model, shared)
    remove(found)
    return found


def stored_once(target: Target, written: dict[str, Written], folder: Path) -> dict[str, Written]:
    """The graphs as they were written, with their common weights stored once where the target can."""
    if target.name != "onnx":
        return written
    return share(written, folder, "model", next(name for name in runner.SECOND if name in written))


def described(decision: Decision) -> dict[str, Any]:
    """What `artefact.json` says of it."""
    names = ("threshold", "escalated", "agreement", "rows", "wanted", "sure")
    found = {name: getattr(decision, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def compare(
    model: nn.Module,
    decision: Decision,
    target: Target,
    folder: Path,
    batches: list[dict[str, torch.Tensor]],
    ports: list[Port],
    tolerance: float,
) -> Parity:
    """Compare both graphs with PyTorch on every batch, and the cascade's choice of rows.

    Returns the result of the graph that differs most. DeployError where one differs by more than the tolerance, and
    where the cascade chooses otherwise than in PyTorch, but for rows right at the threshold.
    """
    results, units = [], graphs_of(model, decision, batches[0], ports)
    for name, unit in units.items():
        given = batches
        if STATES in unit.inputs:
            given = [{**batch, STATES: states_of(units["model"].module, batch)} for batch in batches]
        results.append(parity.compare(unit.module, target.load(folder, name), given, tolerance))
    worse = max(results, key=lambda result: result.relative_error)
    agreement = [result.agreement for result in results if result.agreement is not None]
    gap = max(result.worst_logit for result in results)
    program = open_cascade(folder)
    for batch in batches:
        _check_rows(decision, decision.run(model, batch), program({k: v.numpy() for k, v in batch.items()}))
    return replace(worse, worst_logit=gap, agreement=min(agreement, default=None))


def _check_rows(decision: Decision, expected: Any, got: Mapping[str, np.ndarray]) -> None:
    """DeployError where a runtime chooses other rows, but for those at the threshold."""
    other = to_numpy(expected.escalated) != got[runner.ESCALATED]
    if not other.any():
        return
    # of a row that one side escalates, the other side shows the logits that were judged
    judged = np.where(got[runner.ESCALATED][:, None], to_numpy(expected.logits), got[runner.JUDGED])
    confidence = runner.confidence(judged)
    gap = np.abs(confidence - decision.threshold)[other].max()
    if gap > NEAR:
        raise DeployError(
            f"the cascade chooses other rows than in PyTorch: one of confidence {confidence[other].max():.4f} at the "
            f"threshold {decision.threshold:.4f}; nothing was written"
        )


def cascade(folder: Path | str, inputs: Mapping[str, Any], *, threads: int = 1) -> dict[str, np.ndarray]:
    """The answers of an exported cascade: its outputs by name, and `escalated`, (rows,) True where the second graph
    answered.

    inputs: what the tokenizer or image processor returns, of any number of rows.

    The programs are loaded at each call; `open_cascade` loads them once. Raises DeployError for an artefact that is
    none.
    """
    return open_cascade(folder, threads=threads)({name: np.asarray(value) for name, value in inputs.items()})


def open_cascade(folder: Path | str, *, threads: int = 1) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """`cascade` on an artefact that stays loaded: a function of inputs."""
    with translated():
        program = runner.open_cascade(folder, threads, installed_library())

    def run(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with translated():
            return program({name: np.asarray(value) for name, value in inputs.items()})

    return run
