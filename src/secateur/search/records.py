"""The record of a model that a search found: what was asked and reached, its quality and speeds, and the way there."""

from collections.abc import Iterable, Mapping, Sequence

from secateur.records.quality import are_finite, curve_of, finite, in_words, parity_of, quality_of, stages_of
from secateur.schemas.record import Asked, Curve, FrontierPoint, Record, Speed
from secateur.search.candidate import Candidate
from secateur.search.costs import Cost
from secateur.search.heal import Healed
from secateur.search.measure import Measured
from secateur.search.points import Found, Point, permitted, quality
from secateur.search.stages import MISSED, reached
from secateur.search.target import Call, Target

_UNITS = {
    "params": (1.0, ",.0f", "parameters"),
    "macs": (1.0, ",.0f", "multiply-accumulates"),
    "bytes": (1e6, ".1f", "MB"),
    "memory": (1e6, ".1f", "MB"),
    "latency": (1.0, ".2f", "ms"),
}
"""Quantity -> what a unit of it is worth, how a number of them is written, and what they are called."""


def record_of(found: Found, point: Point, *, title: str) -> Record:
    """The record of one of the models that a search measured. title: its name for people."""
    origin = found.origin
    healed = point.healed if point.healed is not None and point.healed.best else None
    stages = [
        ("dense", None if origin is None else origin.dense),
        ("pruned", point.pruned),
        ("healed", None if healed is None else point.final),
    ]
    refused = [] if point.healed is None or point.healed.refused is None else [point.healed.refused]
    return Record(
        title=title,
        task=point.final.task,
        model_type=None if origin is None else origin.model_type,
        reading=_reading(found, point),
        asked=asked_of(found, point),
        quality=quality_of(point.drop, point.final),
        stages=stages_of(stages),
        sizes=point.sizes,
        speeds=[speed for measured in point.measured.values() for speed in speeds_of(measured)],
        frontier=frontier_of(found, point, title),
        units=list(point.units),
        matrices=list(point.matrices),
        curves=[*healing(point.healed, point.final.divergence), *local_search(point)],
        parities=[one for measured in point.measured.values() for one in parity_of(measured.runtime, measured.parity)],
        notes=[point.drop.reading, *refused, *formats(point.measured.values())],
        provenance=None if origin is None else origin.provenance,
    )


def _reading(found: Found, point: Point) -> str:
    """The result in a sentence: the search's own where it is about this one model."""
    if point is found.best and not found.baselines:
        return found.reading
    fast = "" if point.speed_up is None else f"{point.speed_up:.2f} times as fast; "
    return f"{fast}{in_words(point.drop)}"


# -- what was asked ---------------------------------------------------------------------------------------------------


def asked_of(found: Found, point: Point) -> list[Asked]:
    """The limits of the target, the permitted loss, and what a model reaches of them."""
    target, costs = found.target, () if found.origin is None else found.origin.costs
    wishes = [limit_of(cost, point.candidate, point.measured) for cost in costs] if target.limits else []
    if found.baselines and target.call is not None and point.speed_up is not None:
        wishes.append(Asked(what=_on("speed", target.call), asked=point.name, reached=f"{point.speed_up:.2f}x"))
    if target.max_drop is not None:
        wishes.append(_loss(target, point))
    if target.reader is not None:
        wishes.append(Asked(what="sizes", asked=f"what {target.reader} reads", reached="all of them", is_met=True))
    return wishes


def limit_of(cost: Cost, candidate: Candidate, measured: Mapping[Call, Measured]) -> Asked:
    """One limit and what a candidate reaches. A latency relative to the dense model is given as a speed."""
    limit = cost.limit
    ratio = reached(cost, candidate, measured)
    is_met = ratio <= 1 + (MISSED if limit.call is not None else 1e-9)
    name = _on({"params": "parameters", "macs": "multiply-accumulates"}.get(limit.quantity, limit.quantity), limit.call)
    if limit.relative and limit.quantity == "latency":
        name, asked, got = _on("speed", limit.call), f"{1 / limit.bound:.3g}x", f"{1 / (ratio * limit.bound):.2f}x"
    elif limit.relative:
        asked, got = (f"{share:.1%} of the dense model" for share in (limit.bound, ratio * limit.bound))
    else:
        size, form, unit = _UNITS[limit.quantity]
        asked, got = (f"{value / size:{form}} {unit}" for value in (limit.bound, ratio * limit.bound))
    return Asked(what=name, asked=asked, reached=got, is_met=is_met)


def _loss(target: Target, point: Point) -> Asked:
    """The permitted drop or divergence."""
    what = f"{point.final.divergence} to the dense model" if target.by_divergence else f"drop of {point.drop.metric}"
    asked = f"at most {target.max_drop:g}{', confidently' if target.confident else ''}"
    return Asked(what=what, asked=asked, reached=quality(target, point), is_met=permitted(target, point))


def _on(what: str, call: Call | None) -> str:
    """A quantity with the call that it is measured at."""
    return what if call is None else f"{what} on {call.runtime}, {call.batch} x {call.length} tokens"


def formats(measured: Iterable[Measured]) -> list[str]:
    """A sentence for each runtime on which both models were timed with weights in a format of its own."""
    return [
        f"on {one.runtime} the weights of both models are stored as {one.quantize}, which the quality, as PyTorch "
        "computes it, does not show"
        for one in measured
        if one.quantize is not None
    ]


# -- what was measured ------------------------------------------------------------------------------------------------


def speeds_of(measured: Measured) -> list[Speed]:
    """The times of a model beside those of the dense one; of a decoder for the prompt and for one token."""
    low, high = measured.spread_ms or (None, None)
    dense_low, dense_high = measured.dense_spread_ms or (None, None)
    is_decoder = measured.token_ms is not None and measured.token_speed_up is not None
    speeds = [
        Speed(
            runtime=measured.runtime,
            what="prompt" if is_decoder else "forward",
            batch=measured.batch,
            length=measured.length,
            threads=measured.threads,
            ms=measured.ms,
            low_ms=low,
            high_ms=high,
            dense_ms=measured.dense_ms,
            dense_low_ms=dense_low,
            dense_high_ms=dense_high,
            peak_bytes=measured.memory or None,
        )
    ]
    if measured.token_ms is not None and measured.token_speed_up is not None:
        speeds.append(
            Speed(
                runtime=measured.runtime,
                what="token",
                batch=measured.batch,
                length=1,
                threads=measured.threads,
                ms=measured.token_ms,
                dense_ms=measured.token_ms * measured.token_speed_up,
            )
        )
    return speeds


def frontier_of(found: Found, point: Point, title: str) -> list[FrontierPoint]:
    """All models that a search measured, and the dense one. point, title: the model of the record and its name."""
    dense = point.drop.dense
    points = [FrontierPoint(name="dense", group="dense", latency_share=1.0, parameters_share=1.0, value=dense)]
    if not are_finite(dense):
        points = []
    for group, members in (("chosen", found.points), ("uniform", found.baselines)):
        for one in members:
            if not are_finite(one.drop.pruned):
                continue
            healed = one.healed is not None and one.healed.best
            points.append(
                FrontierPoint(
                    name=title if one is point else one.name,
                    group="chosen" if group == "chosen" else "uniform",
                    latency_share=None if one.speed_up is None else 1 / one.speed_up,
                    parameters_share=one.parameters[0] / one.parameters[1],
                    value=one.drop.pruned,
                    before=finite(one.pruned.value) if healed else None,
                    is_result=one is point,
                )
            )
    return points


def healing(healed: Healed | None, divergence: str) -> list[Curve]:
    """What each round of healing made of the model on the search rows. divergence: its name."""
    if healed is None:
        return []
    rounds, epochs = [healed.before, *healed.rounds], 0.0
    ends: list[float] = []
    for one in rounds:
        epochs += one.epochs
        ends.append(epochs)
    return [
        *curve_of(
            "healing", "epochs", f"{divergence} on search rows", zip(ends, (r.divergence for r in rounds), strict=True)
        ),
        *curve_of(
            "healing", "epochs", f"{healed.metric} on search rows", zip(ends, (r.metric for r in rounds), strict=True)
        ),
    ]


def local_search(point: Point) -> list[Curve]:
    """The least divergence that the local search had found after so many moves."""
    trace: Sequence[tuple[int, float]] = point.trace
    return curve_of("local search", "moves measured", f"{point.final.divergence} on search rows", trace)
