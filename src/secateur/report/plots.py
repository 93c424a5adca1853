"""PNG plots: accuracy over sparsity, the bars of a comparison, and latencies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY, GREEN = "#2b6cb0", "#dd6b20", "#718096", "#2f855a"
MANY = (GREY, BLUE, ORANGE, GREEN, "#805ad5", "#b83280", "#00879e", "#975a16", "#c53030", "#1a202c")


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


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracy before and after fine-tuning, and relative latency and size, one group for each model.

    Each row: `name`, `pruned` and `tuned` (accuracies, or None), `latency` and `size` (share of dense).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    positions = list(range(len(rows)))[::-1]
    for position, row in zip(positions, rows, strict=True):
        if row["pruned"] is not None:
            left.barh(position + 0.2, 100 * row["pruned"], 0.36, color=ORANGE)
            left.text(100 * row["pruned"] + 0.4, position + 0.2, f"{100 * row['pruned']:.1f}", va="center", fontsize=8)
        if row["tuned"] is not None:
            left.barh(position - 0.2, 100 * row["tuned"], 0.36, color=BLUE)
            left.text(100 * row["tuned"] + 0.4, position - 0.2, f"{100 * row['tuned']:.1f}", va="center", fontsize=8)
        right.barh(position + 0.2, row["latency"], 0.36, color=GREEN)
        right.text(row["latency"] + 0.01, position + 0.2, f"{row['latency']:.2f}", va="center", fontsize=8)
        right.barh(position - 0.2, row["size"], 0.36, color=GREY)
        right.text(row["size"] + 0.01, position - 0.2, f"{row['size']:.2f}", va="center", fontsize=8)
    left.set_yticks(positions, [row["name"] for row in rows])
    left.set_xlim(45, 100)
    left.set_xlabel("accuracy, %")
    right.set_xlabel("share of the dense model")
    right.set_xlim(0, 1.25)
    for axes, labels in (
        (left, (("pruned", ORANGE), ("fine-tuned", BLUE))),
        (right, (("latency", GREEN), ("bytes", GREY))),
    ):
        handles = [matplotlib.patches.Patch(color=color, label=label) for label, color in labels]
        axes.legend(handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
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
