"""Writes the Markdown of `deploy.py write` from the results that its stages stored under .cache/deploy."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy import runner

TARGETS = ("onnx", "openvino", "executorch", "litert")
RUNTIMES = ("torch", "secateur", *TARGETS)
MINILMS = ("minilm-dense", "minilm-half", "minilm-uneven")
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "litert-torch")
WITHIN = 0.25
"""The latency ratio should differ from the ratio of MACs by at most this share."""


def write(cache: Path, names: Mapping[str, str], macs: Mapping[str, float]) -> None:
    """Write the dated Markdown under benchmarks/results."""
    results = {path.stem: json.loads(path.read_text()) for path in cache.glob("*.json")}
    machine = runner.machine()
    lines = [
        "# Deployment: targets against models, and what pruning brings there",
        "",
        f"{datetime.date.today()}, `python benchmarks/deploy.py` (stages models, table, latency, int8, grid, write), "
        f"{machine['processor']}, {machine['cores']} cores, one thread, {platform.system()}, Python "
        f"{platform.python_version()}, {', '.join(_version(p) for p in PACKAGES)}. Float32. Timings were taken with "
        "the rest of the machine paused.",
        "",
        *_targets(results, names),
        *_latency(results, macs),
        *_int8(results),
        *_grid(results),
    ]
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-deploy.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(path)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} absent"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; a row may be short."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(f"| {' | '.join(str(cell) for cell in [*row, *[''] * (len(columns) - len(row))])} |")
    return [*lines, ""]


def _targets(found: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    rows = []
    for key, name in names.items():
        rows.append([name, *(_cell(found.get(f"table-{target}-{key}")) for target in TARGETS)])
        if any(f"table-{target}-{key}-generate" in found for target in TARGETS):
            cells = [_cell(found.get(f"table-{target}-{key}-generate"), target) for target in TARGETS]
            rows.append([f"{name}: generation", *cells])
    return [
        "## Targets against models",
        "",
        "Relative error: largest difference from PyTorch over the largest magnitude of the output, both over all "
        "batches. MiniLM on 200 reviews in batches of 1, 3 and 8 (LiteRT: 8 x 64), label agreement in brackets; "
        "SmolLM2 on 16 reviews, agreement of the most likely token; the others on made-up inputs at three shapes "
        "(LiteRT: one). "
        "Generation: greedy tokens with a key-value cache, equal to `generate` of PyTorch; SmolLM2 on two reviews, "
        "padded on the left.",
        "",
        *_table(["model", *TARGETS], rows),
    ]


def _cell(result: Mapping[str, Any] | None, target: str = "") -> str:
    if result is None:
        return "not built (forward pass only)" if target in ("executorch", "litert") else "not run"
    if "refused" in result:
        return f"refused: {result['refused']}"
    parity, note = result["parity"], f", {result['note']}" if "note" in result else ""
    if "tokens" in parity:
        return f"{parity['tokens']} tokens equal, logits {parity['relative_error']:.1e}{note}"
    agreement = "" if parity["agreement"] is None else f" ({100 * parity['agreement']:.1f}%)"
    return f"{parity['relative_error']:.1e}{agreement}{note}"


def _latency(found: Mapping[str, Any], macs: Mapping[str, float]) -> list[str]:
    rows = []
    for runtime in RUNTIMES:
        for name in MINILMS:
            row = found.get(f"latency-{runtime}-{name}")
            if row is None or row["error"]:
                rows.append([runtime, name, row["error"] if row else "not run"])
                continue
            off = row["ratio"] / macs[name] - 1
            within = "-" if name == "minilm-dense" else f"{'yes' if abs(off) <= WITHIN else 'NO'} ({100 * off:+.0f}%)"
            spread = f"{row['low_ms']:.1f} to {row['high_ms']:.1f}"
            times = [f"{row['median_ms']:.1f}", spread, f"{row['ratio']:.3f}", f"{macs[name]:.3f}", within]
            sizes = [f"{row['startup_s']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['bytes'] / 1e6:.1f}"]
            rows.append([runtime, name, *times, *sizes])
    columns = ["runtime", "model", "ms", "quartiles", "of dense", "MACs", "within"]
    return [
        "## Latency of MiniLM, batch 8 x 64",
        "",
        "Median of a forward pass; models in turn, each in a process of its own. Start-up is from the first line of "
        "the worker to the first answer. `MACs`: multiply-accumulates over those of the dense model; `within`: whether "
        f"the latency ratio is within {100 * WITHIN:.0f}% of it.",
        "",
        *_table([*columns, "start-up s", "peak MB", "MB on disk"], rows),
    ]


def _int8(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for runtime in ("onnx", "openvino"):
        for name in ("float32", *MINILMS):
            row, parity = found.get(f"latency-{runtime}-int8-{name}"), found.get(f"parity-{name}-{runtime}-int8")
            if row is None:
                continue
            quality = [f"{parity['relative_error']:.1e}", f"{100 * parity['agreement']:.1f}%"] if parity else ["-", "-"]
            label = "minilm-dense, float32" if name == "float32" else f"{name}, int8"
            took = [f"{row['median_ms']:.1f}", f"{row['ratio']:.3f}", f"{row['bytes'] / 1e6:.1f}"]
            rows.append([runtime, label, *quality, *took])
    return [
        "## Eight bits on top",
        "",
        "ONNX Runtime's dynamic int8 (weights per channel, activations as they come) and NNCF's int8 weights for "
        "OpenVINO; relative error and label agreement on 200 reviews against the float32 PyTorch model of the same "
        "size, times in turn with the dense model in float32.",
        "",
        *_table(["runtime", "model", "relative error", "agreement", "ms", "of dense float32", "MB on disk"], rows),
    ]


def _grid(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for runtime in RUNTIMES:
        grid = found.get(f"grid-{runtime}")
        if grid is None:
            continue
        cells = ", ".join(f"{row['predicted']:.2f} / {row['measured']:.2f}" for row in grid["rows"])
        worst = max(row["error"] for row in grid["rows"])
        rows.append([runtime, cells, f"{100 * grid['median_error']:.1f}%", f"{100 * worst:.1f}%"])
        if len(grid["rows"]) < 10:
            rows.append(["", f"only {len(grid['rows'])} of ten configurations of {runtime} were measured"])
    return [
        "## Latency tables against whole models",
        "",
        "A table of five sizes each of heads and FFN neurons and a model with both halved "
        "(`secateur.deploy.latency_table`), and configurations of MiniLM with another random number of "
        "heads and neurons in every layer, measured whole. Cells: predicted / measured share of the dense "
        "latency. FFN widths of PyTorch are multiples of 16.",
        "",
        *_table(["runtime", "configurations", "median error", "worst"], rows),
    ]
