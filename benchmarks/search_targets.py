"""Asked against measured: a MiniLM classifier pruned to speed-ups on runtimes, beside uniform pruning and a choice by
multiply-accumulates at the same predicted latency. Nothing is trained.

    python benchmarks/search_targets.py run [--runtimes onnx,openvino,torch,secateur] [--shapes 1x128,8x128]
        [--speeds 1.5,2,3] [--seed 0]
    python benchmarks/search_targets.py --write

The first line keeps the result of each runtime, shape and seed under .cache/search/targets; the second writes the dated
Markdown from all of them. Statistics and tables are shared between speeds. Models are timed in turn with the dense one
in processes of their own, on one thread; model and rows are those of search_models.py.
"""

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import search_models
import transformers
from setting import setting

from secateur.data.read import read_table
from secateur.errors import PlanError
from secateur.jobs.demo import LENGTH
from secateur.jobs.open_task import look, open_host, prepare_search
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import bounded, choose
from secateur.search.choosing.chooser import Chosen, Settings
from secateur.search.costs import Cost, macs_cost
from secateur.search.points import Point
from secateur.search.stages import Stages
from secateur.search.target import Call, Limit, Target
from secateur.tasks.base.task import Options

KEPT = search_models.CACHE / "targets"
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino")
SEARCH_SECONDS = 20.0


def run(runtime: str, shape: tuple[int, int], speeds: Sequence[float], seed: int) -> dict[str, Any]:
    """All speeds on one runtime at one shape."""
    folder = search_models.minilm()
    host, task = open_host(look(str((folder / "dense").resolve()), None), search_options())
    table, test = (read_table(folder / f"{part}.csv") for part in ("train", "test"))
    rows = prepare_search(task, table, test, calibration_samples=1000, batch_size=32, seed=seed)
    call = Call(runtime, *shape, threads=1)
    work = KEPT / f"work-{seed}"
    settings = Settings(heal_seconds=0.0, search_seconds=SEARCH_SECONDS, seed=seed)
    stages = Stages(host, task, Target(call=call), rows, work, settings, say=lambda text: print(text, flush=True))
    found = []
    for speed in speeds:
        start = time.perf_counter()
        costs = [bounded(stages.costs[0], 1 / speed)]
        point = stages.point(f"{speed:g}x", costs, heal_seconds=0.0)
        seconds = time.perf_counter() - start
        others = {
            "uniform": stages.uniform(f"uniform-{speed:g}x", costs),
            "by MACs": by_macs(stages, f"macs-{speed:g}x", costs[0]),
        }
        found.append(
            {"asked": speed, "seconds": seconds, "ours": row(point), **{name: row(one) for name, one in others.items()}}
        )
        print(json.dumps(found[-1], indent=1), flush=True)
    return {"runtime": runtime, "shape": shape, "seed": seed, "points": found, "stages": dict(stages.seconds)}


def by_macs(stages: Stages, name: str, latency: Cost) -> Point | None:
    """The model of least expected divergence by multiply-accumulates, at the same predicted latency; not refined."""
    cost = macs_cost(stages.host.layout, Limit("macs", 0.5))
    method = "kfac"
    low, high = 0.02, 1.0
    best: Candidate | None = None
    for _ in range(30):
        middle = (low + high) / 2
        try:
            candidate = choose(stages.levels[method], [bounded(cost, middle)], inside=stages.inside)
        except PlanError:
            low = middle
            continue
        if latency.of(candidate) <= latency.bound:
            low, best = middle, candidate
        else:
            high = middle
    if best is None:
        return None
    chosen = Chosen(best, method, 0.01, stages.trial(method, 0.01).divergence(best))
    small, plan = stages.cut(chosen)
    return stages.finished(name, small, plan, chosen, [replace(latency)], heal_seconds=0.0)


def row(point: Point | None) -> dict[str, Any] | None:
    """What the table needs of a point."""
    if point is None:
        return None
    interval = point.drop.interval or (float("nan"), float("nan"))
    return {
        "speed_up": point.speed_up,
        "kl": point.final.kl,
        "dense": point.drop.dense,
        "pruned": point.drop.pruned,
        "drop": point.lost,
        "interval": list(interval),
        "parameters": point.parameters[0] / point.parameters[1],
        "macs": point.costs,
    }


def search_options() -> Options:
    """Texts as the dense model was trained on them."""
    return Options(max_length=LENGTH)


def write() -> Path:
    """Write the dated Markdown; returns its path."""
    results = [json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))]
    lines = [
        "# Asked against measured: a MiniLM classifier pruned to speed-ups, no training",
        "",
        setting("`python benchmarks/search_targets.py run`, then `--write`", PACKAGES, "one thread for each model"),
        "",
        "Each model was exported, timed in turn with the dense one, and scored on 1,530 reviews that nothing else saw. "
        "`by MACs` and `uniform` keep what the same latency table predicts to be as fast; they are timed too.",
        "",
        "| runtime | batch x tokens | seed | asked | measured | measured / asked | KL | uniform: measured, KL | "
        "by MACs: measured, KL | accuracy: dense, pruned (drop, 95%) | uniform accuracy | parameters |",
        "|" + "---|" * 12,
    ]
    for result in results:
        for point in result["points"]:
            ours = point["ours"]
            low, high = ours["interval"]
            lines.append(
                f"| {result['runtime']} | {result['shape'][0]} x {result['shape'][1]} | {result['seed']} | "
                f"{point['asked']:g} | {ours['speed_up']:.2f} | {ours['speed_up'] / point['asked']:.3f} | "
                f"{ours['kl']:.4f} | {other(point['uniform'])} | {other(point['by MACs'])} | {ours['dense']:.4f}, "
                f"{ours['pruned']:.4f} ({ours['drop']:+.4f}, {low:+.4f} to {high:+.4f}) | "
                f"{point['uniform']['pruned']:.4f} | {ours['parameters']:.2f} |"
            )
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-search-targets.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def other(found: dict[str, Any] | None) -> str:
    """A baseline in a cell."""
    return "-" if found is None else f"{found['speed_up']:.2f}, {found['kl']:.4f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run"])
    parser.add_argument("--runtimes", default="onnx,openvino,torch,secateur")
    parser.add_argument("--shapes", default="1x128,8x128")
    parser.add_argument("--speeds", default="1.5,2,3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.what == "run":
        KEPT.mkdir(parents=True, exist_ok=True)
        for runtime in options.runtimes.split(","):
            for shape in options.shapes.split(","):
                batch, length = map(int, shape.split("x"))
                speeds = [float(speed) for speed in options.speeds.split(",")]
                result = run(runtime, (batch, length), speeds, options.seed)
                (KEPT / f"{runtime}-{shape}-{options.seed}.json").write_text(json.dumps(result, indent=1))
    if options.write:
        print(write())


if __name__ == "__main__":
    main()
