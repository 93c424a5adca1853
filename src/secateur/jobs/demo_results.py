"""What the demo shows, as values: one line for each model, fewer tokens, and the files that are written of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.cost import parameters
from secateur.deploy.jobs.results import Bench, Timing
from secateur.files import write_json
from secateur.jobs.demo import Settings, slug
from secateur.jobs.records import benched
from secateur.metrics.evaluation import Evaluation
from secateur.metrics.outcome import Outcome
from secateur.report.page import write_report
from secateur.search.points import Point
from secateur.torch.files.hashes import add_record
from secateur.torch.host import TorchHost
from secateur.torch.reloaded import folder_bytes

REPORT, TOKENS = "report.html", "fewer-tokens"
"""The report in the demo's folder, and the folder of the model with a schedule of tokens."""


@dataclass(frozen=True)
class Line:
    """One model in the demo's table.

    name: for people. folder: in the demo's output. group: "dense", "trained" on,
    "chosen" by the search, "uniform", "zeros" or "units".
    dense, pruned, tuned: accuracies of the dense model, after pruning, and after training where there was one.
    total, nonzero: numbers of parameters. bytes: size of the saved folder.
    difference: of masked and shrunk outputs, where it was kept. kl: from the dense model's answers.
    latency: runtime -> share of the dense model's latency, both timed in turn. latency_ms: the same in ms.
    """

    name: str
    folder: str
    group: str
    dense: float
    pruned: float | None
    tuned: float | None
    total: int
    nonzero: int
    bytes: int
    difference: float | None
    kl: float | None
    latency: Mapping[str, float] = field(default_factory=dict)
    latency_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The accuracy of the model that was saved."""
        return next(value for value in (self.tuned, self.pruned, self.dense) if value is not None)


@dataclass(frozen=True)
class FewerTokens:
    """Long texts with a schedule of tokens: `texts` of about `length` tokens.

    agreement: share of texts with the answer of all tokens. keep: per cents of the tokens after the blocks.
    latency: runtime -> share of the time of all tokens.
    """

    texts: int
    length: int
    agreement: float
    keep: Sequence[int]
    latency: Mapping[str, float]


@dataclass(frozen=True)
class Shown:
    """What the demo found. lines: the dense model first. asked: speed-ups of the search. test_rows: that accuracies are
    of. seconds: stage -> seconds it took."""

    lines: Sequence[Line]
    uniform: Sequence[Line]
    tokens: FewerTokens
    runtime: str
    asked: Sequence[float]
    test_rows: int
    seconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


# -- lines ------------------------------------------------------------------------------------------------------------


def dense_line(host: TorchHost, evaluation: Evaluation, output: Path) -> Line:
    """The dense model, saved in `output`."""
    count, size = parameters(host.layout), folder_bytes(output / "dense")
    value = evaluation.value
    return Line("dense", "dense", "dense", value, None, None, count.total, count.nonzero, size, None, None)


def point_name(point: Point) -> str:
    """A point of the search, for the table."""
    return f"search: {point.name}"


def point_line(point: Point, group: str, dense: Line) -> Line:
    """A model of the search; its latency there is that of the search's own measurement."""
    name = point_name(point) if group == "chosen" else point.name
    tuned = None if point.healed is None else point.final.value
    times = point.measured.values()
    return Line(
        name=name,
        folder=f"searched/{point.name}",
        group=group,
        dense=dense.dense,
        pruned=point.pruned.value,
        tuned=tuned,
        total=point.parameters[0],
        nonzero=point.parameters[0],
        bytes=folder_bytes(point.folder),
        difference=None,
        kl=point.final.kl,
        latency={m.runtime: m.share for m in times},
        latency_ms={m.runtime: m.ms for m in times},
    )


def outcome_line(outcome: Outcome, dense: Line) -> Line:
    """A model that was pruned by hand."""
    return Line(
        name=outcome.name,
        folder=slug(outcome.name),
        group="zeros" if outcome.nonzero < 0.99 * outcome.total else "units",
        dense=dense.dense,
        pruned=outcome.pruned.value,
        tuned=None if outcome.tuned is None else outcome.tuned.value,
        total=outcome.total,
        nonzero=outcome.nonzero,
        bytes=outcome.bytes,
        difference=outcome.difference,
        kl=(outcome.tuned or outcome.pruned).kl,
    )


def with_times(line: Line, timings: Sequence[Timing]) -> Line:
    """The line with its latency on each runtime that runs it; what the search has timed stays where nothing else is."""
    own = [timing for timing in timings if timing.model == line.name and not timing.error]
    return replace(
        line,
        latency={**line.latency, **{timing.runtime: timing.ratio for timing in own}},
        latency_ms={**line.latency_ms, **{timing.runtime: timing.median_ms for timing in own}},
    )


# -- files ------------------------------------------------------------------------------------------------------------


def write_results(shown: Shown, settings: Settings, folder: Path) -> None:
    """demo.json and demo.png."""
    from secateur.report.plots import plot_demo  # needs matplotlib, which recipes that prune the same model do not

    found = shown.as_json()
    write_json(folder / "demo.json", {"settings": asdict(settings), **found})
    plot_demo(found, folder / "demo.png")


def write_page(times: Bench, tokens: Bench, shown: Shown, folder: Path) -> None:
    """The report on all models but the dense one, and their times in the record of each folder.

    times, tokens: of the models, and of long texts with fewer tokens, each time the dense model first. The latter is
    scored on other texts, so the report does not compare it.
    """
    lines = {line.name: folder / line.folder for line in shown.lines}
    records = []
    for result, folders in ((times, lines), (tokens, {TOKENS: folder / TOKENS})):
        for record in benched(result, folders)[1:]:
            speeds = sorted(record.speeds, key=lambda speed: speed.runtime != shown.runtime)  # the page draws the first
            record = record.model_copy(update={"speeds": speeds})
            add_record(record, folders[record.title])
            if record.title in lines:
                records.append(record.model_copy(update={"title": f"MiniLM, {record.title}"}))
    write_report(records, folder / REPORT)
