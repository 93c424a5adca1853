"""Charts of a record as Vega-Lite specifications, one function each.

Colours are CSS variables of the page, so that a chart follows a change to dark or to print by itself; what a chart
tells by colour it also tells by shape or text. Fields have fixed names; text of users stands in data and titles only.
"""

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]
Rows = Sequence[dict[str, Any]]

INK, FAINT, GRID, PAPER = "var(--ink)", "var(--faint)", "var(--line)", "var(--paper)"
DENSE, CHOSEN, UNIFORM, BEFORE, CELL = (f"var(--{name})" for name in ("dense", "chosen", "uniform", "before", "cell"))
SERIES = (CHOSEN, UNIFORM, "var(--third)", BEFORE, DENSE)
FONT = "system-ui, sans-serif"
CONFIG: Spec = {
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": FAINT, "titleColor": FAINT, "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12,
        "gridColor": GRID, "domainColor": GRID, "tickColor": GRID, "labelSeparation": 8, "titlePadding": 10,
        "labelPadding": 5,
    },
    "legend": {
        "labelColor": INK, "titleColor": FAINT, "labelFontSize": 12, "orient": "top", "title": None, "symbolSize": 90,
        "symbolStrokeWidth": 2, "columns": 2, "offset": 12, "padding": 0, "columnPadding": 20,
    },
    "text": {"color": INK, "fontSize": 12},
    "header": {"labelColor": INK, "titleColor": FAINT},
}  # fmt: skip
GROUPS = {
    "dense": (DENSE, "square"),
    "uniform": (UNIFORM, "triangle-up"),
    "chosen": (CHOSEN, "circle"),
    "before healing": (BEFORE, "diamond"),
}
"""Group of points -> colour and shape."""


def _chart(description: str, rows: Rows, height: int, **rest: Any) -> Spec:
    """The frame that all charts share."""
    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        "config": CONFIG,
        **rest,
    }


def _number(field: str, title: str, text: str = "", **scale: Any) -> Spec:
    axis: Spec = {"tickCount": 6, **({"format": text} if text else {})}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _span(rows: Rows) -> Spec:
    """The scale of y: around its values, and never so narrow that a difference of little meaning fills the chart."""
    values = [row["y"] for row in rows]
    low, high = min(values), max(values)
    least = 0.05 * max(abs(low), abs(high)) or 0.05
    if high - low >= least:
        return {"zero": False, "nice": True}
    return {"zero": False, "domain": [(low + high) / 2 - least, (low + high) / 2 + least]}


def _tips(*pairs: tuple[str, str]) -> list[Spec]:
    """Tooltip lines; all fields are text that is formatted already."""
    return [{"field": field, "type": "nominal", "title": title} for field, title in pairs]


def _by_group(found: Sequence[str], which: int) -> Spec:
    """Scale and legend of the groups that occur; which: 0 for the colour, 1 for the shape."""
    names = [name for name in GROUPS if name in found]
    scale = {"domain": names, "range": [GROUPS[name][which] for name in names]}
    return {"field": "group", "type": "nominal", "scale": scale}


def frontier(rows: Rows, x: str, y: str) -> Spec:
    """Quality over cost. rows: x (share of dense), y, group, name, is_result, and as text x_text, y_text; of points
    before healing also `after`, the value that healing led to."""
    points = _by_group([row["group"] for row in rows], 0), _by_group([row["group"] for row in rows], 1)
    place: Spec = {"x": _number("x", x, ".0%", zero=False, nice=True, padding=14)}
    place["y"] = _number("y", y, **_span(rows), padding=14)
    tips = _tips(("name", "model"), ("group", "group"), ("x_text", x), ("y_text", y))
    shown: Spec = {**place, "color": points[0], "shape": points[1], "tooltip": tips}
    lines: list[Spec] = [
        {
            "transform": [{"filter": {"field": "group", "equal": group}}],
            "mark": {"type": "line", "aria": False, "strokeWidth": 1.5, "opacity": 0.45, "color": GROUPS[group][0]},
            "encoding": {**place, "order": {"field": "x", "type": "quantitative"}},
        }
        for group in ("uniform", "chosen")
        if any(row["group"] == group for row in rows)
    ]
    healed = {
        "transform": [{"filter": "isValid(datum.after)"}],
        "mark": {"type": "rule", "aria": False, "strokeDash": [3, 3]},
        "encoding": {**place, "y2": {"field": "after"}, "color": {"value": BEFORE}},
    }
    result = [{"filter": "datum.is_result"}]
    label: Spec = {"type": "text", "aria": False, "dy": -18, "fontWeight": 600, "fontSize": 13, "text": "this model"}
    return _chart(
        f"{y} over {x}, by group of models",
        rows,
        340,
        layer=[
            *lines,
            *([healed] if any("after" in row for row in rows) else []),
            {
                "transform": result,
                "mark": {
                    "type": "point",
                    "aria": False,
                    "shape": "circle",
                    "size": 420,
                    "strokeWidth": 2,
                    "color": CHOSEN,
                },
                "encoding": {**place, "tooltip": tips},
            },
            {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1}, "encoding": shown},
            {"transform": result, "mark": label, "encoding": place},
        ],
    )


def latencies(rows: Rows) -> Spec:
    """Bars of milliseconds, the dense model beside the pruned one. rows: setting, model ("dense" or "pruned"), ms, low,
    high (quartiles or None), label (text at the end of a bar), ms_text, range_text."""
    order = ["dense", "pruned"]
    place: Spec = {
        "y": {
            "field": "setting", "type": "nominal", "title": None, "sort": None, "scale": {"paddingInner": 0.35},
            "axis": {"labelLimit": 190, "ticks": False, "domain": False, "labelColor": INK},
        },
        "yOffset": {"field": "model", "sort": order, "scale": {"domain": order, "paddingInner": 0.15}},
    }  # fmt: skip
    most = 1.25 * max(row["end"] for row in rows)  # room for the texts at the ends of the bars
    time = _number("ms", "milliseconds, median and quartiles", zero=True, domainMax=most, nice=False)
    models = {"field": "model", "type": "nominal", "scale": {"domain": order, "range": [DENSE, CHOSEN]}}
    tips = _tips(("setting", "where"), ("model", "model"), ("ms_text", "median"), ("range_text", "quartiles"))
    whiskers = [{"filter": "isValid(datum.low) && isValid(datum.high)"}]
    end = {"type": "text", "aria": False, "align": "left", "dx": 6, "fontSize": 12}
    return _chart(
        "latency in milliseconds of the dense and the pruned model, by runtime",
        rows,
        20 + 30 * len(rows),
        layer=[
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 3},
                "encoding": {**place, "x": time, "color": models, "tooltip": tips},
            },
            {
                "transform": whiskers,
                "mark": {"type": "rule", "aria": False, "color": INK, "strokeWidth": 1.5},
                "encoding": {**place, "x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}},
            },
            {"mark": end, "encoding": {**place, "x": {"field": "end", "type": "quantitative"}, "text": _text("label")}},
        ],
    )


def _text(field: str) -> Spec:
    return {"field": field, "type": "nominal"}


def cells(rows: Rows, what: str) -> Spec:
    """A heat-map with blocks as rows: the more is kept, the stronger the colour. rows: row, column, share, label, and
    as text share_text, sizes. what: what the share is of, for the description."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    slim = len(columns) > 4
    place: Spec = {
        "y": {
            "field": "row", "type": "nominal", "sort": None, "title": None,
            "axis": {"labelColor": INK, "domain": False, "ticks": False, "labelLimit": 110},
        },
        "x": {
            "field": "column", "type": "nominal", "sort": None, "title": None,
            "axis": {
                "orient": "top", "labelAngle": -35 if slim else 0, "labelColor": INK, "domain": False, "ticks": False,
                "labelAlign": "left" if slim else "center", "labelLimit": 150,
            },
        },
    }  # fmt: skip
    kept: Spec = {
        "field": "share",
        "type": "quantitative",
        "legend": None,
        "scale": {"domain": [0, 1], "range": [0.05, 1]},
    }
    tips = _tips(("row", "where"), ("column", "what"), ("share_text", what), ("sizes", "sizes"))
    ink = {"condition": {"test": "datum.share > 0.7", "value": "var(--on-cell)"}, "value": INK}
    return _chart(
        f"{what}, by block",
        rows,
        24 * len({row["row"] for row in rows}),
        layer=[
            {
                "mark": {"type": "rect", "fill": CELL, "stroke": PAPER, "strokeWidth": 2, "cornerRadius": 4},
                "encoding": {**place, "fillOpacity": kept, "tooltip": tips},
            },
            {
                "mark": {"type": "text", "aria": False, "fontSize": 11, "baseline": "middle", "tooltip": None},
                "encoding": {**place, "text": _text("label"), "color": ink},
            },
        ],
    )


def curves(rows: Rows, names: Sequence[str], x: str, y: str) -> Spec:
    """Lines of numbers over numbers. rows: x, y, name, x_text, y_text. names: of the lines, in their order."""
    colours = [SERIES[number % len(SERIES)] for number in range(len(names))]
    dashes = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4]]
    legend = None if len(names) == 1 else {"columns": 2, "symbolType": "stroke", "labelLimit": 220}
    colour: Spec = {
        "field": "name", "type": "nominal", "sort": None, "legend": legend,
        "scale": {"domain": list(names), "range": colours},
    }  # fmt: skip
    dash: Spec = {
        "field": "name", "type": "nominal", "legend": legend,
        "scale": {"domain": list(names), "range": [dashes[number % len(dashes)] for number in range(len(names))]},
    }  # fmt: skip
    place: Spec = {"x": _number("x", x, zero=False, nice=False), "y": _number("y", y, **_span(rows))}
    tips = _tips(("name", "line"), ("x_text", x), ("y_text", y))
    return _chart(
        f"{y} over {x}: {', '.join(names)}",
        rows,
        240,
        layer=[
            {
                "mark": {"type": "line", "aria": False, "strokeWidth": 2},
                "encoding": {**place, "color": colour, "strokeDash": dash},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1 if len(rows) <= 60 else 0},
                "encoding": {**place, "color": colour, "tooltip": tips},
            },
        ],
    )


def stages(rows: Rows, y: str) -> Spec:
    """Quality after each step of the work. rows: stage, y, y_text, divergence_text, and is_low for a point that is
    lower than its neighbours, whose text stands below."""
    place: Spec = {
        "x": {
            "field": "stage", "type": "nominal", "sort": None, "title": None, "scale": {"padding": 0.5},
            "axis": {"labelAngle": 0, "labelColor": INK, "labelLimit": 100, "domain": False, "ticks": False},
        },
        "y": _number("y", y, **_span(rows), padding=24),
    }  # fmt: skip
    tips = _tips(("stage", "after"), ("y_text", y), ("divergence_text", "divergence"))
    return _chart(
        f"{y} after each step",
        rows,
        240,
        layer=[
            {
                "mark": {"type": "line", "aria": False, "color": CHOSEN, "strokeWidth": 2, "opacity": 0.5},
                "encoding": place,
            },
            {
                "mark": {"type": "point", "filled": True, "size": 100, "color": CHOSEN, "opacity": 1},
                "encoding": {**place, "tooltip": tips},
            },
            *(
                {
                    "transform": [{"filter": {"field": "is_low", "equal": is_low}}],
                    "mark": {"type": "text", "aria": False, "dy": 16 if is_low else -14},
                    "encoding": place | {"text": _text("y_text")},
                }
                for is_low in sorted({row["is_low"] for row in rows})
            ),
        ],
    )


def comparison(rows: Rows, x: str, y: str) -> Spec:
    """Several models in one plane. rows: x (share of dense), y, name, group ("dense" or "chosen"), x_text, y_text."""
    groups = [row["group"] for row in rows]
    place: Spec = {
        "x": _number("x", x, ".0%", zero=False, nice=True, padding=24),
        "y": _number("y", y, **_span(rows), padding=20),
    }
    tips = _tips(("name", "model"), ("x_text", x), ("y_text", y))
    shown: Spec = {**place, "color": {**_by_group(groups, 0), "legend": None}, "tooltip": tips}
    shape: Spec = {**_by_group(groups, 1), "legend": None}
    return _chart(
        f"{y} over {x}, one point a model",
        rows,
        340,
        layer=[
            {
                "mark": {"type": "point", "filled": True, "size": 130, "opacity": 1},
                "encoding": {**shown, "shape": shape},
            },
            {
                "mark": {"type": "text", "aria": False, "dy": -15, "fontSize": 12, "limit": 150},
                "encoding": {**place, "text": _text("name")},
            },
        ],
    )
