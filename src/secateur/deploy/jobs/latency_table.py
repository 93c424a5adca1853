"""Latency tables: what each number of heads and neurons costs on a runtime, measured on whole models.

Axes of one kind and size share a curve: every axis of a group is cut to a size at once, the cut model is timed in turn
with the dense one in processes of their own, and the change is split evenly between the axes. A model with fewer layers
gives the change for a layer. One more model, with all axes at half, shows what cuts bring together beyond the sum.
Whole models are measured, because a block timed alone pays for its own call, and misses what the runtime fuses across
blocks and what caches hold.
"""

import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost import Curve, LatencyTable, unit_parameters
from secateur.deploy import runner, target
from secateur.deploy.gguf.export import write_for_times
from secateur.deploy.jobs.bench import ALIASES, artefact, check_runtimes
from secateur.deploy.jobs.export import tokenizer_of
from secateur.deploy.jobs.pairs import time_pairs
from secateur.deploy.jobs.timing import Say, Shape
from secateur.deploy.operator_library import installed_library
from secateur.files import write_json
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.runtime.layers.tuning import cache_file, machine_key
from secateur.schemas import reading
from secateur.schemas import results as schema
from secateur.torch.host import TorchHost

KINDS = ("head", "kv", "ffn")
"""Kinds of axes that a table covers; heads that come in groups are covered by their groups."""
DENSE, TOGETHER = "dense", "all at half"
STEP = 16
"""Widths that fill vector registers: others cost up to 40% more in PyTorch's products, which no curve foretells."""
WITHIN = 0.01
"""Half width of the interval of a ratio at which its configuration has been timed enough."""
Sizes = Mapping[str, int]


def groups_of(layout: Layout) -> dict[str, list[str]]:
    """Axes that cost alike, by group: same kind, size and parameters of a unit."""
    groups: dict[str, list[str]] = {}
    for kind in KINDS:
        for axis in layout.of_kind(kind):
            if not axis.frozen and not axis.parts and axis.size > 1:
                key = f"{kind} {axis.size} x {unit_parameters(layout, axis.name):.0f}"
                groups.setdefault(key, []).append(axis.name)
    return groups


def grid(size: int, points: int, step: int = STEP) -> list[int]:
    """Sizes to measure below the full one, evenly spaced from a `points`-th of it; wide axes in multiples of `step`."""
    step = step if size >= 8 * step else 1
    return sorted({max(1, round(size * i / points / step) * step) for i in range(1, points)} - {size})


def latency_table(
    host: TorchHost,
    runtime: str,
    *,
    batch: int = 8,
    length: int = 64,
    threads: int = 1,
    points: int = 5,
    step: int = STEP,
    turns: int = 40,
    together: bool = True,
    quantize: str | None = None,
    cache: bool = True,
    say: Say = lambda text: None,
) -> LatencyTable:
    """A table of latencies of a model on a runtime: what each number of heads and FFN neurons costs.

    runtime: torch, secateur, gguf (llama.cpp), or a target of `secateur.deploy.export`.
    batch, length: the shape of the calls. threads: of the processes that are timed, pinned.
    points: how many sizes of each kind of axis are measured.
    step: wide axes are measured at multiples of it, where the table is exact.
    turns: how often each cut model is timed in turn with the dense one, at most: it ends when the ratio is known.
    together: whether a model with all axes at half is measured too, which shows what cuts bring beyond their sum.
    quantize: the format of the weights on llama.cpp.
    cache: keep the table by runtime, machine, shape and layout, and take it from there the next time.
    say: gets a line of text for each step.

    Raises DeployError when the runtime is not there or refuses the model.
    """
    runtime = check_runtimes([ALIASES.get(runtime, runtime)])[0]
    form = () if quantize is None else (quantize,)
    key = key_of(host.layout, runtime, batch, length, threads, points, step, together, *form)
    file = cache_file().parent / f"latency-{key}.json"
    if cache and file.is_file():
        try:
            return read_table(file, host.layout, runtime, (batch, length), threads)
        except target.DeployError as error:
            say(str(error))
    with tempfile.TemporaryDirectory(prefix="secateur-table-") as work:
        sizes = wanted(host.layout, points, step, together=together)
        made = artefacts(host, runtime, sizes, (batch, length), Path(work), say, quantize)
        ratios, dense_ms = measure(made, batch, length, threads, turns, say)
    table = assemble(host.layout, runtime, (batch, length), threads, points, ratios, dense_ms, step=step)
    if cache:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, table.as_json())
    return table


def read_table(file: Path, layout: Layout, runtime: str, shape: Shape, threads: int) -> LatencyTable:
    """A table from the cache; DeployError when it is damaged, or was measured for something else."""
    found = reading.read(file, schema.Table, error=target.DeployError, remedy="measuring again")
    if (found.runtime, found.batch, found.length, found.threads) != (runtime, *shape, threads):
        raise target.DeployError(f"{file} is a table of other calls or another runtime; measuring again")
    axes = {axis for axes in groups_of(layout).values() for axis in axes}
    if (set(found.axes), set(found.layers)) != (axes, set(fewer_layers(layout))):
        raise target.DeployError(f"{file} is a table of another model; measuring again")
    return LatencyTable.from_json(found.model_dump())


def key_of(layout: Layout, *settings: Any) -> str:
    """What a table depends on, as a file name."""
    made_of = json.dumps([machine_key(), str(layout), *settings])
    return hashlib.sha256(made_of.encode()).hexdigest()[:20]


def wanted(layout: Layout, points: int, step: int = STEP, *, together: bool = True) -> dict[str, Sizes]:
    """Configurations to measure, by name: the dense model, each group at each size of its grid, fewer layers, and where
    `together` all axes at half.
    """
    configurations: dict[str, Sizes] = {DENSE: {}}
    for group, axes in groups_of(layout).items():
        for size in grid(layout.axis(axes[0]).size, points, step):
            configurations[f"{group} @ {size}"] = dict.fromkeys(axes, size)
    for axis, count in fewer_layers(layout).items():
        configurations[f"{axis} @ {count}"] = {axis: count}
    if together:
        configurations[TOGETHER] = halves(layout)
    return configurations


def fewer_layers(layout: Layout) -> dict[str, int]:
    """Axis of layers -> how many layers its configuration has: one or two fewer."""
    return {a.name: a.size - (2 if a.size > 3 else 1) for a in layout.of_kind("layer") if a.size > 1}


def halves(layout: Layout) -> dict[str, int]:
    """Every axis of every group at half of its units."""
    return {name: layout.axis(name).size // 2 for axes in groups_of(layout).values() for name in axes}


def artefacts(
    host: TorchHost,
    runtime: str,
    configurations: Mapping[str, Sizes],
    shape: Shape,
    work: Path,
    say: Say = lambda text: None,
    quantize: str | None = None,
) -> dict[str, Path]:
    """An artefact of each configuration for the runtime, under `work`; the first units of an axis stay. Those for
    llama.cpp are written as `quantize` says, without a comparison that would take longer than their times.
    """
    made = {}
    tokenizer = tokenizer_of(host.source) if runtime == target.GGUF and host.source is not None else None
    for number, (name, sizes) in enumerate(configurations.items()):
        folder, destination = work / f"model-{number}", work / f"{runtime}-{number}"
        made[name] = destination
        if destination.exists():  # an earlier run got this far
            continue
        say(f"{runtime}: {name}")
        cut = host.copy()
        plan = Plan({axis: np.arange(size) for axis, size in sizes.items()})
        if sizes:
            cut.resize(plan)
        if runtime == target.GGUF:
            write_for_times(cut.model, tokenizer, destination, quantize=quantize or "f16")
            continue
        cut.save(folder, overwrite=True)
        artefact(folder, runtime, destination, shape, loading={})
    return made


def measure(
    made: Mapping[str, Path],
    batch: int,
    length: int,
    threads: int,
    turns: int,
    say: Say = lambda text: None,
) -> tuple[dict[str, float], float]:
    """Each artefact in turn with the dense one: its time over that of the dense one, and the dense median in ms."""
    ratios: dict[str, float] = {}
    seconds: list[float] = []
    library = installed_library()
    with target.translated():
        dense = runner.Worker(made[DENSE], batch, length, threads, library, ours={})
        try:
            for name, folder in made.items():
                if name == DENSE:
                    continue
                other = runner.Worker(folder, batch, length, threads, library, ours={})
                try:
                    pairs = time_pairs(dense, other, within=WITHIN, turns=turns)
                finally:
                    other.stop()
                ratios[name] = pairs.ratio
                seconds += pairs.first
                say(f"{name}: {ratios[name]:.3f}")
        finally:
            dense.stop()
    return ratios, 1e3 * statistics.median(seconds)


def peaks(
    host: TorchHost,
    runtime: str,
    *,
    batch: int = 1,
    length: int = 128,
    threads: int = 1,
    quantize: str | None = None,
    say: Say = lambda text: None,
) -> tuple[int, int]:
    """Peak bytes of a process that runs the model, and of one that runs it with every axis at half.

    Raises DeployError when the runtime is not there, refuses the model, or the system reports no memory.
    """
    runtime = check_runtimes([runtime])[0]
    with tempfile.TemporaryDirectory(prefix="secateur-memory-") as work:
        configurations = {DENSE: {}, TOGETHER: halves(host.layout)}
        made = artefacts(host, runtime, configurations, (batch, length), Path(work), say, quantize)
        with target.translated():
            rows = runner.measure(
                made, batch, length, threads, 1, 2, library=installed_library(), ours={name: {} for name in made}
            )
    error = next((row["error"] for row in rows.values() if "error" in row), None)
    if error is not None:
        raise target.DeployError(error)
    found = rows[DENSE]["peak_bytes"], rows[TOGETHER]["peak_bytes"]
    if not all(found):
        raise target.DeployError("this system does not report the memory of a process; limit bytes instead")
    return found


def assemble(
    layout: Layout,
    runtime: str,
    shape: Sequence[int],
    threads: int,
    points: int,
    ratios: Mapping[str, float],
    dense_ms: float,
    *,
    step: int = STEP,
) -> LatencyTable:
    """The table behind measured ratios."""
    curves, axes = {}, {}
    for group, names in groups_of(layout).items():
        full = layout.axis(names[0]).size
        sizes = grid(full, points, step)
        changes = [(ratios[f"{group} @ {size}"] - 1.0) / len(names) for size in sizes]
        curves[group] = Curve((*sizes, full), (*changes, 0.0))
        axes.update(dict.fromkeys(names, group))
    layers = {
        axis: (ratios[f"{axis} @ {count}"] - 1.0) / (layout.axis(axis).size - count)
        for axis, count in fewer_layers(layout).items()
    }
    table = LatencyTable(runtime, shape[0], shape[1], threads, dense_ms, curves, axes, layers=layers)
    if TOGETHER not in ratios:
        return table
    return replace(table, together=ratios[TOGETHER] - table.share(halves(layout)))
