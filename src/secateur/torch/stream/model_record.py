"""The record of a language model that was pruned block by block: errors by block, zeros by matrix, and its size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.cost import parameters
from secateur.layout import Layout
from secateur.recipe import Recipe
from secateur.records.model import matrices_with_zeros, weight_bytes
from secateur.records.provenance import data_file, provenance_of
from secateur.records.quality import curve_of
from secateur.schemas.record import Asked, Curve, Record, Sizes


def model_record(
    blocks: Sequence[Mapping[str, Any]],
    layout: Layout,
    recipe: Recipe,
    *,
    title: str,
    model_type: str | None,
    source: Path,
    folder: Path,
    distilled: Sequence[float] | None,
) -> Record:
    """The record of a run.

    blocks: the journal's record of each block. layout: of the model. source: the folder of the dense model.
    folder: the folder with the pruned weights. distilled: loss of the first and the last pass of distillation.
    """
    layers = [(number, layer) for number, block in enumerate(blocks) for layer in block["layers"]]
    weights = sum(layer["weights"] for _, layer in layers)
    zeros = sum(layer["zeros"] for _, layer in layers)
    total = parameters(layout).total
    reached = f"{zeros / weights:.2%} of the linear weights are zero" if weights else "no weight was pruned"
    notes = ["the quality was not measured; `secateur eval` does that"]
    if distilled:
        notes.append(f"distilled: loss {distilled[0]:.4f} in the first pass, {distilled[-1]:.4f} in the last")
    return Record(
        title=title,
        model_type=model_type,
        reading=reached,
        asked=[Asked(what=f"{recipe.pattern} by {recipe.criterion}", asked=_asked(recipe), reached=reached)],
        sizes=Sizes(
            parameters=total,
            dense_parameters=total,
            nonzero=total - zeros,
            bytes=weight_bytes(folder),
            dense_bytes=weight_bytes(source),
            macs_share=1.0,
        ),
        matrices=matrices_with_zeros(
            layout, [(layer["name"], number, layer["weights"], layer["zeros"]) for number, layer in layers]
        ),
        curves=_curves(blocks),
        notes=notes,
        provenance=provenance_of(
            seconds=sum(block["seconds"] for block in blocks),
            seed=recipe.seed,
            data=[data_file("calibration", path) for path in recipe.calibration],
        ),
    )


def _asked(recipe: Recipe) -> str:
    return str(recipe.pattern) if recipe.sparsity is None else f"sparsity {recipe.sparsity:g}"


def _curves(blocks: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The error of each block, as far as it was measured, and that of its output before and after tuning."""
    tuned = [block["tuned"] or (None, None) for block in blocks]
    return [
        *curve_of("pruning", "block", "relative error of its weights", enumerate(b["error"] for b in blocks)),
        *curve_of("before tuning", "block", "relative error of its output", enumerate(pair[0] for pair in tuned)),
        *curve_of("after tuning", "block", "relative error of its output", enumerate(pair[1] for pair in tuned)),
    ]
