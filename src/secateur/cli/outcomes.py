"""Prints the result of a pruning run: the scores of a model, or the table and the plot of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.jobs.text_classifier import Outcome


def show(outcome: "Outcome", *, json: bool) -> None:
    """Print the result of one job."""
    if json:
        common.print_json(outcome.as_json())
        return
    scores = [("dense", outcome.dense), ("pruned", outcome.pruned)]
    scores += [("fine-tuned", outcome.tuned)] if outcome.tuned else []
    common.print_table(
        f"{outcome.folder}: {outcome.dense.examples} held-out examples",
        ["model", "accuracy", "loss", "KL to dense", "flips"],
        [
            (name, f"{s.accuracy:.4f}", f"{s.loss:.4f}", _or_dash(s.kl, "{:.4f}"), _or_dash(s.flips, "{:.1%}"))
            for name, s in scores
        ],
    )
    work = "unknown (the layout lists no products)"
    if outcome.macs_ratio is not None:
        work = f"{common.percent(outcome.macs_ratio)} of dense"
    common.say(
        f"parameters {common.millions(outcome.total)}, not zero {common.millions(outcome.nonzero)}; "
        f"MACs {work}; {common.megabytes(outcome.bytes)} MB on disk; "
        f"masked against shrunk {outcome.difference:.1e}; reloaded logits equal"
    )
    if outcome.inexact:
        common.say(outcome.inexact)
    _show_provenance(outcome)


def _show_provenance(outcome: "Outcome") -> None:
    """Print what the steps of a plan note about multiples of units, earlier zeros, and the weights that count."""
    steps = outcome.provenance.get("steps") or [outcome.provenance]
    for multiple, names in (m for step in steps for m in (step.get("multiples") or {}).items()):
        common.say(f"multiples of {multiple} units were kept of {', '.join(names)}: the model runs with no others")
    for earlier in (step["found"] for step in steps if "found" in step):
        common.say(
            f"{earlier['zeros']:,} zeros that the model came with stay zero ({earlier['tensors']} linear weights)"
        )
    for counted in (step["counted"] for step in steps if "weights" in step.get("counted", {})):
        common.say(
            f"the sparsity counts {counted['tensors']} linear weights of the layers ({counted['weights']:,} values)"
        )
        common.say("single zeros do not speed up dense runtimes; units (--pattern head,ffn) do")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def write_sweep(points: Sequence[Any], folder: Path, title: str) -> None:
    """Write sweep.json and sweep.png."""
    from dataclasses import asdict

    from secateur.files import write_json
    from secateur.report.plots import plot_sweep

    write_json(folder / "sweep.json", [asdict(point) for point in points])
    plot_sweep(points, folder / "sweep.png", title)


def show_sweep(points: Sequence[Any], output: Path, *, json: bool) -> None:
    """Print the table of a sweep."""
    from dataclasses import asdict

    if json:
        common.print_json([asdict(point) for point in points])
        return
    common.print_table(
        f"{output}/sweep.png shows this; accuracy before any fine-tuning",
        ["sparsity", "threshold", "accuracy", "against dense", "KL to dense", "flips"],
        [
            (
                common.percent(p.sparsity),
                _or_dash(p.threshold, "{:.4g}"),
                f"{p.score.accuracy:.4f}",
                f"{p.score.accuracy - points[0].score.accuracy:+.4f}",
                _or_dash(p.score.kl, "{:.4f}"),
                _or_dash(p.score.flips, "{:.1%}"),
            )
            for p in points
        ],
        left=0,
    )
