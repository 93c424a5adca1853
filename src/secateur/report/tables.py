"""Tables of a record: those that a report shows, and the numbers behind each chart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.report import figures
from secateur.schemas.record import Curve, Matrix, Provenance, Record, Speed, Stage, Units


@dataclass(frozen=True)
class Cell:
    """One cell. note: a second, fainter line. key: what a column is sorted by; the text where it is None. mark: "met"
    or "missed". bar: share of a bar behind the cell, 0..1. link: the anchor on the page that it leads to."""

    text: str
    note: str = ""
    key: float | None = None
    mark: str = ""
    bar: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Table:
    """A table. left: how many of the first columns are text; the first is the heading of its row. is_sortable: readers
    may sort it by its columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int = 1
    is_sortable: bool = False


NONE = Cell("–")
"""A cell of what was not measured."""


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | str]], left: int = 1) -> Table:
    """A table whose cells may be plain texts; columns that are empty in every row are left out."""
    whole = [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    used = [number for number in range(len(columns)) if any(row[number].text not in ("", "–") for row in whole)]
    return Table(
        caption,
        tuple(columns[number] for number in used),
        tuple(tuple(row[number] for number in used) for row in whole),
        sum(number < left for number in used),
    )


def asked(record: Record) -> Table | None:
    """What was asked, what was reached, and whether that is enough; None where nothing was asked."""
    if not record.asked:
        return None
    verdicts = {True: Cell("met", mark="met"), False: Cell("missed", mark="missed"), None: NONE}
    rows = [(wish.what, wish.asked, wish.reached, verdicts[wish.is_met]) for wish in record.asked]
    return table("What was asked and what was reached", ["what", "asked", "reached", "met"], rows, left=4)


def quality(record: Record) -> Table | None:
    """The saved model beside the dense one on the test rows."""
    found = record.quality
    if found is None:
        return None
    better = "higher is better" if found.is_higher_better else "lower is better"
    rows = [
        (Cell(f"{found.metric} of the dense model", better), figures.score(found.dense)),
        (Cell(f"{found.metric} of this model"), figures.score(found.pruned)),
        (Cell("drop", "how much worse this model is"), figures.signed(found.drop)),
    ]
    if found.interval is not None:
        rows.append((Cell("95% interval of the drop"), figures.interval(found)))
    if found.divergence is not None:
        name = Cell(found.divergence_name, "divergence from the outputs of the dense model")
        rows.append((name, figures.number(found.divergence, 3)))
    if found.flips is not None:
        rows.append((Cell("answers that changed"), figures.share(found.flips)))
    no_labels = "without labels: the dense model's answers take their place" if found.is_against_dense else ""
    rows.append((Cell("test rows", no_labels), f"{found.rows:,}"))
    return table("Quality on the test rows", ["what", "value"], rows)


def forms(record: Record) -> Table | None:
    """A language model and the dense one, as they are and with fewer bits; None where no such rows were measured."""
    if not record.forms:
        return None
    rows = [
        (
            Cell(form.name),
            figures.size(form.bytes, "B"),
            figures.score(form.value),
            NONE if form.drop is None else Cell(figures.signed(form.drop), figures.interval(form)),
            NONE if form.divergence is None else figures.number(form.divergence, 3),
            NONE if form.flips is None else figures.share(form.flips),
            NONE if form.prompt_speed is None else figures.number(form.prompt_speed, 3),
            NONE if form.decode_speed is None else figures.number(form.decode_speed, 3),
        )
        for form in record.forms
    ]
    columns = ["weights", "size", "loss for a token", "more than dense", "KL to dense", "answers that changed"]
    columns += ["prompt tokens/s", "new tokens/s"]
    return table("Fewer weights beside fewer bits", columns, rows)


def speeds(found: Sequence[Speed], settings: Sequence[str]) -> Table:
    """Times of both models. settings: one label for each speed."""
    rows = [
        (
            setting,
            figures.threads(speed),
            figures.milliseconds(speed.ms),
            quartiles(speed.low_ms, speed.high_ms),
            NONE if speed.dense_ms is None else figures.milliseconds(speed.dense_ms),
            quartiles(speed.dense_low_ms, speed.dense_high_ms),
            times(speed),
            NONE if speed.peak_bytes is None else figures.size(speed.peak_bytes, "B"),
        )
        for speed, setting in zip(found, settings, strict=True)
    ]
    columns = ["where", "threads", "this model", "quartiles", "dense", "quartiles of dense", "speed-up", "peak memory"]
    return table("Latency, the median of a call", columns, rows)


def times(speed: Speed) -> str:
    """1.96× for twice as fast; a dash where the dense model was not timed."""
    faster = figures.times(speed)
    return NONE.text if faster is None else f"{faster:.2f}×"


def quartiles(low: float | None, high: float | None) -> str:
    """The first and the third quartile; a dash where they are not known."""
    if low is None or high is None:
        return NONE.text
    return f"{figures.milliseconds(low)} to {figures.milliseconds(high)}"


def frontier(rows: Sequence[dict], x: str, y: str) -> Table:
    """The points of a frontier or a comparison chart."""
    cells = [(row["name"], row["group"], row["x_text"], row["y_text"]) for row in rows]
    return table(f"{y} over {x}", ["model", "group", x, y], cells, left=2)


def stages(found: Sequence[Stage], y: str) -> Table:
    """Quality after each step."""
    rows = [
        (
            stage.name,
            figures.score(stage.value),
            "" if stage.divergence is None else figures.number(stage.divergence, 3),
        )
        for stage in found
    ]
    return table("Quality after each step", ["after", y, "divergence"], rows)


def units(found: Sequence[Units]) -> Table:
    """How many units of each axis are left."""
    rows = [
        (unit.axis, unit.kind, f"{unit.kept:,}", f"{unit.total:,}", figures.share(unit.kept / max(unit.total, 1)))
        for unit in found
    ]
    return table("Units kept", ["axis", "kind", "kept", "of", "share"], rows, left=2)


def matrices(found: Sequence[Matrix]) -> Table:
    """The sizes and densities of the weights."""
    rows = [
        (
            matrix.name,
            figures.shape(matrix.shape),
            figures.shape(matrix.dense_shape or []),
            figures.share(matrix.density),
        )
        for matrix in found
    ]
    return table("Weights of linear layers", ["weight", "shape", "dense shape", "density"], rows)


def curves(found: Sequence[Curve], x: str, y: str) -> Table:
    """The points of curves that share a chart."""
    rows = [
        (curve.name, figures.number(point[0]), figures.number(point[1])) for curve in found for point in curve.points
    ]
    return table(f"{y} over {x}", ["line", x, y], rows)


def parity(record: Record) -> Table | None:
    """How far the artefacts are from PyTorch, and how far they may be."""
    if not record.parities:
        return None
    rows = []
    for found in record.parities:
        of_bound = found.difference / found.bound if found.bound > 0 else None
        verdict = Cell("within", mark="met") if found.difference <= found.bound else Cell("outside", mark="missed")
        rows.append(
            (
                found.runtime,
                figures.number(found.difference, 3),
                figures.number(found.bound, 3),
                NONE if of_bound is None else Cell(figures.share(of_bound), bar=min(of_bound, 1.0)),
                NONE if found.inputs is None else f"{found.inputs:,}",
                verdict,
            )
        )
    columns = ["runtime", "largest difference", "bound", "difference as share of the bound", "inputs", "verdict"]
    return table("Artefacts beside PyTorch, on the same inputs", columns, rows)


def data(found: Provenance) -> Table | None:
    """The data that was used."""
    if not found.data:
        return None
    rows = [
        (file.role, file.name, file.sha256 or NONE, NONE if file.rows is None else f"{file.rows:,}")
        for file in found.data
    ]
    return table("Data", ["role", "name", "SHA-256", "rows"], rows, left=3)


def comparison(records: Sequence[Record]) -> Table:
    """One row a model, for a table that readers sort."""
    places = list(dict.fromkeys(_place(speed) for record in records for speed in record.speeds))
    metrics = {record.quality.metric for record in records if record.quality}
    name = metrics.pop() if len(metrics) == 1 else ""
    columns = ["model", name or "quality", "drop", "95% interval", *places, "parameters", "weights"]
    rows = []
    for number, record in enumerate(records, 1):
        by_place = {_place(speed): speed for speed in record.speeds}
        rows.append(
            (
                Cell(record.title, record.model_type or "", link=f"model-{number}"),
                *_quality_cells(record, has_name=not name),
                *(_speed_cell(by_place.get(place)) for place in places),
                *_size_cells(record),
            )
        )
    plain = table("Models side by side", columns, rows)
    return Table(plain.caption, plain.columns, plain.rows, plain.left, is_sortable=True)


def _place(speed: Speed) -> str:
    return f"{figures.setting(speed)}, {figures.threads(speed)}"


def _quality_cells(record: Record, *, has_name: bool) -> tuple[Cell, Cell, Cell]:
    found = record.quality
    if found is None:
        return NONE, NONE, NONE
    value = Cell(
        figures.score(found.pruned), found.metric if has_name else f"dense {figures.score(found.dense)}", found.pruned
    )
    width = Cell(figures.interval(found), key=found.interval[1]) if found.interval else NONE
    return value, Cell(figures.signed(found.drop), key=found.drop), width


def _speed_cell(speed: Speed | None) -> Cell:
    if speed is None:
        return NONE
    return Cell(figures.milliseconds(speed.ms), times(speed) if speed.dense_ms else "", speed.ms)


def _size_cells(record: Record) -> tuple[Cell, Cell]:
    found = record.sizes
    if found is None:
        return NONE, NONE
    of_dense = figures.share(found.parameters / found.dense_parameters) if found.dense_parameters else ""
    parameters = Cell(figures.size(found.parameters), f"{of_dense} of dense" if of_dense else "", found.parameters)
    if found.bytes is None:
        return parameters, NONE
    of_dense = figures.share(found.bytes / found.dense_bytes) if found.dense_bytes else ""
    return parameters, Cell(figures.size(found.bytes, "B"), f"{of_dense} of dense" if of_dense else "", found.bytes)
