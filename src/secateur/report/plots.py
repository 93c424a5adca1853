"""PNG plots: accuracy over sparsity and over speed, and latencies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#718096", "#2f855a"
MANY = (GREY, BLUE, ORANGE, GREEN, "#805ad5", "#b83280", "#00879e", "#975a16", "#c53030", "#1a202c")


RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
"""Runtimes whose names people write in another way."""


def plot_sweep(points: Sequence[Any], path: Path, title: str) -> None:
    """Accuracy over sparsity; a point that has a threshold is labelled with it. The first point is the dense model."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    x = [100 * point.sparsity for point in points]
    y = [point.score.value for point in points]
    axes.axhline(y[0], color=GREY, linestyle="--", linewidth=1, label=f"dense, {y[0]:.1f}%")
    axes.plot(x, y, color=BLUE, marker="o", label="pruned, not fine-tuned")
    for point, px, py in zip(points, x, y, strict=True):
        if point.threshold is not None:
            axes.annotate(f"τ {point.threshold:.3g}", (px, py), textcoords="offset points", xytext=(4, 7), fontsize=8)
    axes.set_xlabel("sparsity, % of what was ranked")
    axes.set_ylabel(points[0].score.metric)
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_demo(found: Mapping[str, Any], path: Path, *, is_dark: bool = False) -> None:
    """Accuracy against speed on one runtime: the dense model, what a search chose, uniform pruning, zeros and units.

    found: of `demo.json`: `lines` and `uniform`, each with `name`, `group`, `dense`, `pruned`, `tuned` (accuracies, or
        null) and `latency` (runtime -> share of the dense model's); `runtime`, `test_rows`.
    is_dark: for a dark page; the ground is transparent.
    """
    runtime, ink = found["runtime"], "#e2e8f0" if is_dark else "#1a202c"
    colors = {"dense": GREY, "trained": GREY, "chosen": BLUE, "uniform": ORANGE, "zeros": GREEN, "units": "#805ad5"}
    names = {"chosen": "the search", "uniform": "uniform pruning", "zeros": "zeros, on kernels that skip them"}
    names |= {"units": "the same share of every layer's units, trained"}
    with matplotlib.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)):
        figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
        dense = 100 * found["lines"][0]["dense"]
        error = 100 * (dense / 100 * (1 - dense / 100) / found["test_rows"]) ** 0.5
        axes.axhspan(dense - error, dense + error, color=GREY, alpha=0.15, linewidth=0)
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1, label="dense, one standard error around it")
        for group, label in names.items():
            points = [(1.0, dense)] if group in ("chosen", "uniform") else []
            for line in (*found["lines"], *found["uniform"]):
                if line["group"] == group and runtime in line["latency"]:
                    points.append((1 / line["latency"][runtime], 100 * (line["tuned"] or line["pruned"])))
            if len(points) > (group in ("chosen", "uniform")):
                style = "-" if group in ("chosen", "uniform") else ""
                axes.plot(*zip(*points, strict=True), linestyle=style, marker="o", color=colors[group], label=label)
        axes.set_xlabel(f"times as fast as the dense model, measured on {RUNTIMES.get(runtime, runtime)}")
        axes.set_ylabel("accuracy, %")
        axes.set_title(f"MiniLM on movie reviews, {found['test_rows']:,} held out", loc="left", fontsize=11)
        axes.margins(x=0.08, y=0.25)
        axes.legend(frameon=False, loc="lower left", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        figure.savefig(path, dpi=130, transparent=is_dark)
        plt.close(figure)


def _in_words(runtime: str, batch: int, length: int) -> str:
    return f"{runtime}\n{batch} x {length}" if length else f"{runtime}\n{batch}"


def plot_bench(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Latency of each model on each runtime and shape, quartiles as whiskers.

    Each row: `model`, `runtime`, `batch`, `length`, `median_ms`, `low_ms`, `high_ms` (or `error`), `ratio`.
    """
    rows = [row for row in rows if not row["error"]]
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = list(dict.fromkeys((row["runtime"], row["batch"], row["length"]) for row in rows))
    group_of = [(row["runtime"], row["batch"], row["length"]) for row in rows]
    height = 0.8 / max((group_of.count(group) for group in groups), default=1)
    colors = {model: MANY[i % len(MANY)] for i, model in enumerate(models)}
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * max(1, len(rows))), layout="constrained")
    for number, row in enumerate(rows):
        group = group_of[number]
        index = group_of[:number].count(group)
        y = groups.index(group) + (index + 0.5 - group_of.count(group) / 2) * height
        whiskers = [[row["median_ms"] - row["low_ms"]], [row["high_ms"] - row["median_ms"]]]
        axes.barh(y, row["median_ms"], 0.9 * height, color=colors[row["model"]], xerr=whiskers, ecolor="black")
        axes.text(row["high_ms"], y, f"  {row['median_ms']:.1f} ({row['ratio']:.2f})", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [_in_words(*group) for group in groups])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("ms a forward pass (share of the first model)")
    axes.set_title(title, loc="left", fontsize=11)
    handles = [matplotlib.patches.Patch(color=color, label=model) for model, color in colors.items()]
    axes.legend(handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_frontier(found: Any, path: Path, title: str) -> None:
    """Quality against measured latency: the dense model, the points of a search, and uniform pruning beside them.

    found: a `secateur.search.points.Found`.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    first = found.points[0]
    axes.axhline(first.drop.dense, color=GREY, linestyle="--", linewidth=1, label=f"dense, {first.drop.dense:.4g}")

    def share(point: Any) -> float:
        return 1 / point.speed_up if point.speed_up else point.parameters[0] / point.parameters[1]

    drawn = [
        ("healed", BLUE, "o", found.points, lambda p: p.final.value),
        ("before healing", ORANGE, "^", found.points, lambda p: p.pruned.value),
        ("uniform, before healing", GREEN, "s", found.baselines, lambda p: p.pruned.value),
    ]
    for label, color, marker, points, value in drawn:
        if points:
            axes.plot([share(p) for p in points], [value(p) for p in points], color=color, marker=marker, label=label)
    for point in found.points:
        axes.annotate(
            point.name, (share(point), point.final.value), textcoords="offset points", xytext=(4, 7), fontsize=8
        )
    axes.set_xlabel("latency, measured, share of the dense model" if first.speed_up else "share of the parameters")
    axes.set_ylabel(first.drop.metric)
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_levels(levels: Any, path: Path, title: str) -> None:
    """Expected divergence over the share of units that are gone: a panel a kind, a line an axis, the first darkest.

    levels: a `secateur.search.levels.Levels`.
    """
    kinds = list(dict.fromkeys(axis.kind for axis in levels.axes.values()))
    figure, panels = plt.subplots(1, len(kinds), figsize=(1 + 4 * len(kinds), 3.8), layout="constrained", squeeze=False)
    for panel, kind in zip(panels[0], kinds, strict=True):
        axes = [axis for axis in levels.axes.values() if axis.kind == kind]
        shades = matplotlib.colormaps["viridis"]
        for number, axis in enumerate(axes):
            share = [gone / axis.size for gone in range(axis.size + 1)]
            shown = [loss if loss > 0 else float("nan") for loss in axis.losses]
            color = shades(0.9 * number / max(1, len(axes) - 1))
            panel.plot(share, shown, color=color, label=axis.axis if number in (0, len(axes) - 1) else None)
        panel.set_yscale("log")
        panel.set_xlabel(f"share of {kind} units gone")
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("expected divergence")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
