"""The parts of a report: from a record to tiles, tables, charts and examples. What was not measured is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.report import charts, figures, layers, tables
from secateur.report.tables import Table
from secateur.schemas.record import Curve, Example, FrontierPoint, Provenance, Record, Speed

MOST_EXAMPLES, MOST_CHARACTERS, MOST_IMAGE_CHARACTERS = 40, 1200, 900_000
"""Of the examples on a page: how many, how long a text, and how much all images may weigh as base64."""
MOST_POINTS = 300
"""Points of a curve on the page; longer ones are thinned."""
IMAGES = tuple(f"data:image/{kind};base64," for kind in ("png", "jpeg", "webp", "gif"))


@dataclass(frozen=True)
class Tile:
    """A big number. change: a second number beside it."""

    label: str
    value: str
    detail: str = ""
    change: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers."""

    title: str
    spec: dict[str, Any]
    numbers: Table
    text: str = ""


@dataclass(frozen=True)
class Shown:
    """An example: a text, or an image as a data URI."""

    text: str
    image: str
    expected: str
    dense: str
    pruned: str
    divergence: str


@dataclass(frozen=True)
class Model:
    """Everything that a page shows of one record."""

    anchor: str
    title: str
    kind: str
    reading: str
    tiles: list[Tile]
    asked: Table | None
    quality: Table | None
    forms: Table | None
    frontier: list[Figure]
    stages: list[Figure]
    speeds: list[Figure]
    layers: list[Figure]
    curves: list[Figure]
    parity: Table | None
    examples: list[Shown]
    examples_left: int
    notes: list[str]
    provenance: list[tuple[str, str]] = field(default_factory=list)
    command: str = ""
    versions: list[tuple[str, str]] = field(default_factory=list)
    data: Table | None = None


def of_record(record: Record, number: int) -> Model:
    """The parts of one record, the `number`-th of the page."""
    examples = _examples(record.examples)
    source = record.provenance or Provenance()
    return Model(
        anchor=f"model-{number}",
        title=record.title,
        kind=", ".join(word for word in (record.model_type, record.task) if word),
        reading=record.reading,
        tiles=[*_speed_tiles(record), *_quality_tiles(record), *_size_tiles(record)],
        asked=tables.asked(record),
        quality=tables.quality(record),
        forms=tables.forms(record),
        frontier=list(_frontier(record)),
        stages=list(_stages(record)),
        speeds=list(_speeds(record)),
        layers=list(_layers(record)),
        curves=list(_curves(record)),
        parity=tables.parity(record),
        examples=examples,
        examples_left=len(record.examples) - len(examples),
        notes=record.notes,
        provenance=_provenance(source),
        command=source.command,
        versions=sorted(source.versions.items()),
        data=tables.data(source),
    )


def headline(record: Record) -> Speed | None:
    """The speed beside dense that was asked for: of the call, or on the runtime, that a wish names; else the first."""
    beside = [speed for speed in record.speeds if speed.dense_ms is not None]
    wishes = " ".join(wish.what for wish in record.asked if "speed" in wish.what or "latency" in wish.what)
    named = [speed for speed in beside if f"{speed.runtime}, {speed.batch} x {speed.length} tokens" in wishes]
    named += [speed for speed in beside if speed.runtime in wishes]
    return next(iter((*named, *beside)), None)


def metric(record: Record) -> str:
    """The main metric's name, with the direction where less is better."""
    if record.quality is None:
        return "main metric"
    return record.quality.metric + ("" if record.quality.is_higher_better else " (lower is better)")


def comparison(records: Sequence[Record]) -> Figure | None:
    """Quality over latency of the models with the first model's metric; None where fewer than two have both."""
    pairs = [(record, headline(record)) for record in records]
    measured = [(record, speed) for record, speed in pairs if record.quality and speed]
    if len({record.title for record, _ in measured}) < 2:
        return None
    y = metric(measured[0][0])
    same = [(record, speed) for record, speed in measured if metric(record) == y]
    if len(same) < 2:
        return None
    rows = [
        _point(record.title, speed.ms / (speed.dense_ms or speed.ms), record.quality.pruned, "chosen")
        for record, speed in same
        if record.quality and speed
    ]
    dense = dict.fromkeys(record.quality.dense for record, _ in same if record.quality)
    rows += [_point("dense", 1.0, value, "dense") for value in dense]
    runtimes = ", ".join(dict.fromkeys(speed.runtime for _, speed in same if speed))
    x = f"latency on {runtimes}, share of dense"
    left = len(records) - len(same)
    is_up = all(record.quality.is_higher_better for record, _ in same if record.quality)
    text = f"{'Up' if is_up else 'Down'} and to the left is better."
    if left:
        text += f" {left} of {len(records)} models lack these figures, or have another metric."
    return Figure("Quality and latency", charts.comparison(rows, x, y), tables.frontier(rows, x, y), text)


# -- parts ------------------------------------------------------------------------------------------------------------


def _speed_tiles(record: Record) -> Iterator[Tile]:
    speed = headline(record)
    if speed is None:
        return
    times = f"{figures.milliseconds(speed.ms)}, dense {figures.milliseconds(speed.dense_ms or speed.ms)}"
    what = {"forward": "Speed", "prompt": "Prompt speed", "token": "Token speed"}[speed.what]
    detail = f"{times}; {figures.inputs(speed)}, {figures.threads(speed)}"
    yield Tile(f"{what} on {speed.runtime}", tables.times(speed), detail)


def _quality_tiles(record: Record) -> Iterator[Tile]:
    found = record.quality
    if found is None:
        return
    width = f"95% interval {figures.interval(found)}" if found.interval else "no interval was computed"
    rows = f" on {found.rows:,} rows" + (" against the dense model's answers" if found.is_against_dense else "")
    detail = f"dense {figures.score(found.dense)}{rows}"
    yield Tile(_capital(metric(record)), figures.score(found.pruned), detail)
    yield Tile(f"Drop of {found.metric}", figures.signed(found.drop), width)


def _size_tiles(record: Record) -> Iterator[Tile]:
    found = record.sizes
    if found is None:
        return
    parts = [f"{figures.size(found.parameters)} parameters"]
    if found.dense_parameters:
        parts[0] = f"{figures.size(found.parameters)} of {figures.size(found.dense_parameters)} parameters"
    if found.nonzero is not None and found.nonzero != found.parameters:
        parts.append(f"{figures.size(found.nonzero)} not zero")
    if found.bytes is not None:
        dense = f", dense {figures.size(found.dense_bytes, 'B')}" if found.dense_bytes else ""
        parts.append(f"{figures.size(found.bytes, 'B')} of weights{dense}")
    if found.macs_share is not None:
        parts.append(f"{figures.share(found.macs_share)} of the multiply-accumulates")
    if found.nonzero is not None and found.nonzero < found.parameters == found.dense_parameters:
        yield Tile("Not zero", figures.share(found.nonzero / found.parameters), "; ".join(parts), "of dense")
    elif found.dense_parameters:
        yield Tile("Size", figures.share(found.parameters / found.dense_parameters), "; ".join(parts), "of dense")
    else:
        yield Tile("Size", figures.size(found.parameters), "; ".join(parts), "parameters")


def _point(name: str, x: float, y: float, group: str, **more: Any) -> dict[str, Any]:
    texts = {"x_text": figures.share(x), "y_text": figures.score(y)}
    return {"name": name, "x": x, "y": y, "group": group, "is_result": False, **texts, **more}


def _frontier(record: Record) -> Iterator[Figure]:
    """Measured models over latency, or over parameters where more points have those."""
    fast = [point for point in record.frontier if point.latency_share is not None]
    small = [point for point in record.frontier if point.parameters_share is not None]
    found, is_speed = (fast, True) if len(fast) >= len(small) else (small, False)
    if len(found) < 2:
        return
    x = "latency, share of dense" if is_speed else "parameters, share of dense"
    rows = [row for point in found for row in _points(point, is_speed=is_speed)]
    y = metric(record)
    better = "Up" if record.quality is None or record.quality.is_higher_better else "Down"
    text = f"Every point is a model that was measured. {better} and to the left is better."
    if any(point.before is not None for point in found):
        text += " A dashed line leads from a model before healing to the same model after it."
    yield Figure("Quality over cost", charts.frontier(rows, x, y), tables.frontier(rows, x, y), text)


def _points(point: FrontierPoint, *, is_speed: bool) -> Iterator[dict[str, Any]]:
    x = (point.latency_share if is_speed else point.parameters_share) or 0.0
    yield _point(point.name, x, point.value, point.group, is_result=point.is_result)
    if point.before is not None:
        yield _point(point.name, x, point.before, "before healing", after=point.value)


def _speeds(record: Record) -> Iterator[Figure]:
    """One chart for forward passes, one for prompts and one for tokens: their times are of different sizes."""
    titles = {"forward": "Latency", "prompt": "Latency of a prompt", "token": "Latency of one token"}
    for what, title in titles.items():
        found = [speed for speed in record.speeds if speed.what == what]
        if not found:
            continue
        one = len({speed.threads for speed in found}) == 1
        settings = [figures.setting(speed) + ("" if one else f", {figures.threads(speed)}") for speed in found]
        rows = [row for speed, setting in zip(found, settings, strict=True) for row in _bars(speed, setting)]
        text = "Median of a call; the thin line spans the quartiles. Both models ran in turns."
        yield Figure(title, charts.latencies(rows), tables.speeds(found, settings), text)


def _bars(speed: Speed, setting: str) -> Iterator[dict[str, Any]]:
    timed = [("pruned", speed.ms, speed.low_ms, speed.high_ms)]
    if speed.dense_ms is not None:
        timed.insert(0, ("dense", speed.dense_ms, speed.dense_low_ms, speed.dense_high_ms))
    for model, ms, low, high in timed:
        faster = f" ({tables.times(speed)})" if model == "pruned" and speed.dense_ms is not None else ""
        label = f"{figures.milliseconds(ms)}{faster}"
        texts = {"ms_text": figures.milliseconds(ms), "range_text": tables.quartiles(low, high), "label": label}
        row = {"setting": setting, "model": model, "ms": ms, "low": low, "high": high, "end": max(ms, high or 0.0)}
        yield {**row, **texts}


def _stages(record: Record) -> Iterator[Figure]:
    if len(record.stages) < 2:
        return
    rows: list[dict[str, Any]] = []
    for stage in record.stages:
        earlier = sum(row["name"] == stage.name for row in rows)
        name = f"{stage.name} {earlier + 1}" if earlier else stage.name
        divergence = tables.NONE.text if stage.divergence is None else figures.number(stage.divergence, 3)
        texts = {"y_text": figures.score(stage.value), "divergence_text": divergence}
        rows.append({"stage": name, "name": stage.name, "y": stage.value, **texts})
    for number, row in enumerate(rows):
        beside = rows[max(number - 1, 0) : number] + rows[number + 1 : number + 2]
        row["is_low"] = all(row["y"] < other["y"] for other in beside)
    y = metric(record)
    yield Figure("Quality after each step", charts.stages(rows, y), tables.stages(record.stages, y))


def _layers(record: Record) -> Iterator[Figure]:
    rows = layers.unit_rows(record.units)
    if rows:
        text = "The stronger the colour, the more is left. Each cell says how many units are kept, and of how many."
        text = f"{text} {layers.of_the_model(record.units)}".strip()
        yield Figure("Units kept in each block", charts.cells(rows, "share kept"), tables.units(record.units), text)
    rows, what = layers.matrix_rows(record.matrices)
    if rows:
        title = _capital(f"{what} of each weight")
        yield Figure(title, charts.cells(rows, what), tables.matrices(record.matrices))


def _curves(record: Record) -> Iterator[Figure]:
    """Curves of the same quantities share a chart; one point is no curve."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in record.curves:
        if len(curve.points) > 1:
            groups.setdefault((curve.x, curve.y), []).append(_thinned(curve))
    for (x, y), found in groups.items():
        names = list(dict.fromkeys(curve.name for curve in found))
        rows = [
            {"name": curve.name, "x": a, "y": b, "x_text": figures.number(a), "y_text": figures.number(b)}
            for curve in found
            for a, b in curve.points
        ]
        title = found[0].name if len(names) == 1 else y
        yield Figure(_capital(title), charts.curves(rows, names, x, y), tables.curves(found, x, y))


def _thinned(curve: Curve) -> Curve:
    """At most `MOST_POINTS` points of a curve, with its first and its last."""
    many = len(curve.points)
    if many <= MOST_POINTS:
        return curve
    kept = [curve.points[round(number * (many - 1) / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]
    return curve.model_copy(update={"points": kept})


def _examples(found: Sequence[Example]) -> list[Shown]:
    """The examples that fit on the page, those with the largest divergence first."""
    ordered = sorted(
        found, key=lambda example: -1.0 if example.divergence is None else example.divergence, reverse=True
    )
    shown: list[Shown] = []
    weight = 0
    for example in ordered[:MOST_EXAMPLES]:
        image = example.shown if example.kind == "image" and example.shown.startswith(IMAGES) else ""
        weight += len(image)
        if weight > MOST_IMAGE_CHARACTERS:
            break
        texts = (_cut(text) for text in (example.shown, example.expected or "", example.dense, example.pruned))
        text, expected, dense, pruned = texts
        divergence = "" if example.divergence is None else figures.number(example.divergence, 3)
        shown.append(Shown("" if image else text, image, expected, dense, pruned, divergence))
    return shown


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def _provenance(found: Provenance) -> list[tuple[str, str]]:
    """What is known of how the model was made, as pairs of a term and its value."""
    machine = found.machine
    processor = ", ".join(
        part
        for part in (
            (machine.processor, f"{machine.cores} cores" if machine.cores else "", machine.system) if machine else ()
        )
        if part
    )
    pairs = [
        ("Date", figures.date(found.date)),
        ("Duration", "" if found.seconds is None else figures.seconds(found.seconds)),
        ("Seed", "" if found.seed is None else str(found.seed)),
        ("Machine", processor),
        ("Python", machine.python if machine else ""),
    ]
    return [(term, value) for term, value in pairs if value]
