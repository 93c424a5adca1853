"""Prints the result of a pruning run: the scores of a model, or the table and the plot of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cli import common

if TYPE_CHECKING:
    from secateur.cli.pruning.choice import Choice
    from secateur.jobs.prune_model import Data
    from secateur.metrics.drop import Drop
    from secateur.metrics.evaluation import Evaluation
    from secateur.metrics.outcome import Outcome
    from secateur.token_schedule import TokenSchedule
    from secateur.torch.host import TorchHost


def show(outcome: "Outcome", *, json: bool) -> None:
    """Print the result of one job."""
    if json:
        common.print_json(outcome.as_json())
        return
    stages = [("dense", outcome.dense), ("pruned", outcome.pruned)]
    stages += [("fine-tuned", outcome.tuned)] if outcome.tuned else []
    stages += [("fewer tokens", outcome.shortened)] if outcome.shortened else []
    show_stages(f"{outcome.folder}: {outcome.dense.rows} held-out rows, {outcome.dense.task}", stages)
    show_drop(outcome.drop)
    work = "unknown (the layout lists no products)"
    if outcome.macs_ratio is not None:
        work = f"{common.percent(outcome.macs_ratio)} of dense"
    common.say(
        f"parameters {common.millions(outcome.total)}, not zero {common.millions(outcome.nonzero)}; "
        f"MACs {work}; {common.megabytes(outcome.bytes)} MB on disk; "
        f"masked against shrunk {outcome.difference:.1e}; reloaded logits equal"
    )
    say_schedule(outcome.folder, outcome.schedule)
    if outcome.inexact:
        common.say(outcome.inexact)
    _show_provenance(outcome)


def show_evaluation(model: str, result: "Evaluation", drop: "Drop | None", *, json: bool) -> None:
    """Print the evaluation of a model, and its drop against the dense model if there is one."""
    if json:
        compared = {} if drop is None else drop.as_json()
        common.print_json({"model": model, **result.as_json(), **compared})
        return
    show_stages(f"{result.rows} rows, {result.task}", [(model, result)])
    if drop is not None:
        show_drop(drop)


def show_stages(title: str, stages: "Sequence[tuple[str, Evaluation]]") -> None:
    """A table of evaluations, one a line."""
    first = stages[0][1]
    where = ", against the dense model's answers" if first.is_against_dense else ""
    common.print_table(
        f"{title}{where}",
        ["model", *first.values, "loss", f"{first.divergence} to dense", "flips"],
        [
            (
                name,
                *(f"{value:.4f}" for value in e.values.values()),
                _or_dash(e.loss, "{:.4f}"),
                _or_dash(e.kl, "{:.4f}"),
                _or_dash(e.flips, "{:.1%}"),
            )
            for name, e in stages
        ],
    )


def show_drop(drop: "Drop") -> None:
    """Print the drop with its interval."""
    interval = "no interval" if drop.interval is None else f"95% [{drop.interval[0]:+.4f}, {drop.interval[1]:+.4f}]"
    common.say(
        f"{drop.metric} {drop.dense:.4f} -> {drop.pruned:.4f}: drop {drop.drop:+.4f}, {interval}; {drop.reading}"
    )


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


def try_all(
    host: "TorchHost", choice: "Choice", material: "Data", output: Path, title: str, *, overwrite: bool, json: bool
) -> None:
    """Score the model pruned to each budget of a sweep; write and print the table."""
    from secateur.files import new_folder
    from secateur.jobs.sweep import sweep

    points = sweep(host, choice.criterion, choice.pattern, choice.sweep or [], material, common.track)
    with new_folder(output, overwrite=overwrite) as folder:
        write_sweep(points, folder, title)
    show_sweep(points, output, json=json)


def write_sweep(points: Sequence[Any], folder: Path, title: str) -> None:
    """Write sweep.json and sweep.png."""
    from secateur.files import write_json
    from secateur.report.plots import plot_sweep

    write_json(folder / "sweep.json", [point.as_json() for point in points])
    plot_sweep(points, folder / "sweep.png", title)


def show_sweep(points: Sequence[Any], output: Path, *, json: bool) -> None:
    """Print the table of a sweep."""
    if json:
        common.print_json([point.as_json() for point in points])
        return
    metric = points[0].score.metric
    common.print_table(
        f"{output}/sweep.png shows this; {metric} before any fine-tuning",
        ["sparsity", "threshold", metric, "against dense", f"{points[0].score.divergence} to dense", "flips"],
        [
            (
                common.percent(p.sparsity),
                _or_dash(p.threshold, "{:.4g}"),
                f"{p.score.value:.4f}",
                f"{p.score.value - points[0].score.value:+.4f}",
                _or_dash(p.score.kl, "{:.4f}"),
                _or_dash(p.score.flips, "{:.1%}"),
            )
            for p in points
        ],
        left=0,
    )


def say_schedule(name: str, schedule: "TokenSchedule | None") -> None:
    """Print a schedule in words; None prints nothing."""
    if schedule is not None:
        work = common.percent(schedule.work())
        common.say(f"{name} {schedule}: a block works on {work} of them on average")
