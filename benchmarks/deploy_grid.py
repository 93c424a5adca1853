"""The latency table of MiniLM on a runtime, and ten random configurations measured against what it says.

`deploy.py grid RUNTIME` runs one stage a call: exports, the table, the ten configurations. The constants and the store
that all stages of deploy.py share are here.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.cost import LatencyTable
from secateur.deploy.jobs import latency_table
from secateur.files import write_json
from secateur.torch.host import TorchHost
from secateur.torch.open import open_folder

CACHE = Path(__file__).parent.parent / ".cache" / "deploy"
BATCH, LENGTH = 8, 64
POINTS, TURNS, CONFIGURATIONS, SEED = 5, 4, 10, 1
STEPS = {"onnx": 1}
"""FFN widths are multiples of this on a runtime; elsewhere of 16, as other widths cost more in PyTorch's products."""


def keep(name: str, value: Any) -> None:
    """Store one result."""
    CACHE.mkdir(parents=True, exist_ok=True)
    write_json(CACHE / f"{name}.json", value)


def random_sizes(host: TorchHost, step: int) -> dict[str, dict[str, int]]:
    """Ten configurations with another random size, from an eighth up, of every axis of every layer; wide axes in
    multiples of `step`.
    """
    random = np.random.default_rng(SEED)
    configurations = {}
    for number in range(CONFIGURATIONS):
        sizes = {}
        for axes in latency_table.groups_of(host.layout).values():
            for name in axes:
                size = host.layout.axis(name).size
                count = int(random.integers(max(1, size // 8), size + 1))
                sizes[name] = count // step * step if size >= 8 * step else count
        configurations[f"random {number}"] = sizes
    return configurations


def make_grid(runtime: str, source: Path) -> None:
    """Run the first stage that is not done: exports (which go on where they stopped), the table, the configurations."""
    work = CACHE / "grid" / runtime
    table_file = CACHE / f"ratios-{runtime}.json"
    host = open_folder(source, dtype=torch.float32)
    step = STEPS.get(runtime, latency_table.STEP)
    configurations = {**latency_table.wanted(host.layout, POINTS, step), **random_sizes(host, step)}
    configurations[latency_table.TOGETHER] = configurations.pop(latency_table.TOGETHER)  # the last to be exported
    folders = {name: work / f"{runtime}-{number}" for number, name in enumerate(configurations)}
    if not all(folder.exists() for folder in folders.values()):
        work.mkdir(parents=True, exist_ok=True)
        latency_table.artefacts(host, runtime, configurations, (BATCH, LENGTH), work, print)
    elif not table_file.exists():
        in_table = {name: folder for name, folder in folders.items() if not name.startswith("random")}
        ratios, dense_ms = latency_table.measure(in_table, BATCH, LENGTH, 1, TURNS, print)
        table = latency_table.assemble(host.layout, runtime, (BATCH, LENGTH), 1, POINTS, ratios, dense_ms, step=step)
        write_json(table_file, table.as_json())
    else:
        compare(runtime, LatencyTable.from_json(json.loads(table_file.read_text())), configurations, folders)


def compare(
    runtime: str, table: LatencyTable, configurations: dict[str, dict[str, int]], folders: dict[str, Path]
) -> None:
    """Measure the random configurations, and store them beside what the table predicts."""
    chosen = {n: folder for n, folder in folders.items() if n == latency_table.DENSE or n.startswith("random")}
    ratios, dense_ms = latency_table.measure(chosen, BATCH, LENGTH, 1, TURNS, print)
    rows = []
    for name, ratio in ratios.items():
        share = table.share(configurations[name])
        rows.append({"name": name, "predicted": share, "measured": ratio, "error": abs(share / ratio - 1)})
    median = statistics.median(row["error"] for row in rows)
    keep(f"grid-{runtime}", {"dense_ms": dense_ms, "table_ms": table.dense_ms, "rows": rows, "median_error": median})
    print(f"{runtime}: median error {median:.3f}, worst {max(row['error'] for row in rows):.3f}")
