"""The latency table of MiniLM on a runtime, and ten random configurations measured against what it says.

Stages of `deploy.py grid RUNTIME`, run one after the other by calling it again: exports, the table, the ten.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
from deploy import BATCH, CACHE, LENGTH, keep

from secateur.cost import LatencyTable
from secateur.deploy.jobs import latency_table
from secateur.files import write_json
from secateur.torch.host import TorchHost
from secateur.torch.open import open_folder

POINTS, TURNS, CONFIGURATIONS, SEED = 5, 4, 10, 1


STEPS = {"onnx": 1}
"""FFN widths are multiples of this on a runtime; elsewhere of 16, as other widths cost more in PyTorch's products."""


def random_sizes(host: TorchHost, step: int) -> dict[str, dict[str, int]]:
    """Ten configurations, another size of every axis of every layer from an eighth up; wide ones in steps."""
    random = np.random.default_rng(SEED)
    found = {}
    for number in range(CONFIGURATIONS):
        sizes = {}
        for axes in latency_table.groups_of(host.layout).values():
            for name in axes:
                size = host.layout.axis(name).size
                count = int(random.integers(max(1, size // 8), size + 1))
                sizes[name] = count // step * step if size >= 8 * step else count
        found[f"random {number}"] = sizes
    return found


def make_grid(runtime: str, source: Path) -> None:
    """The next stage that has not been done: exports (taken up where they stopped), the table, the configurations."""
    place = CACHE / "grid" / runtime
    ratios_file = CACHE / f"ratios-{runtime}.json"
    host = open_folder(source, dtype=torch.float32)
    step = STEPS.get(runtime, latency_table.STEP)
    configurations = {**latency_table.wanted(host.layout, POINTS, step), **random_sizes(host, step)}
    configurations[latency_table.TOGETHER] = configurations.pop(latency_table.TOGETHER)  # the last to be exported
    made = {name: place / f"{runtime}-{number}" for number, name in enumerate(configurations)}
    if not all(folder.exists() for folder in made.values()):
        place.mkdir(parents=True, exist_ok=True)
        latency_table.artefacts(host, runtime, configurations, (BATCH, LENGTH), place, print)
        return
    if not ratios_file.exists():
        only = {name: folder for name, folder in made.items() if not name.startswith("random")}
        ratios, dense_ms = latency_table.measure(only, BATCH, LENGTH, 1, TURNS, print)
        found = latency_table.assemble(host.layout, runtime, (BATCH, LENGTH), 1, POINTS, ratios, dense_ms, step=step)
        write_json(ratios_file, found.as_json())
        return
    known = LatencyTable.from_json(json.loads(ratios_file.read_text()))
    chosen = {n: f for n, f in made.items() if n == latency_table.DENSE or n.startswith("random")}
    ratios, dense_ms = latency_table.measure(chosen, BATCH, LENGTH, 1, TURNS, print)
    rows = []
    for name, ratio in ratios.items():
        share = known.share(configurations[name])
        rows.append({"name": name, "predicted": share, "measured": ratio, "error": abs(share / ratio - 1)})
    median = statistics.median(row["error"] for row in rows)
    keep(f"grid-{runtime}", {"dense_ms": dense_ms, "table_ms": known.dense_ms, "rows": rows, "median_error": median})
    print(f"{runtime}: median error {median:.3f}, worst {max(row['error'] for row in rows):.3f}")
