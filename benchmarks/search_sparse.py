"""Zeros alone against units and zeros together, at equal latency on our sparse kernels: MiniLM that reads reviews.

At the latency that even zeros take at each density: today's repair with one density; a repair that looks at the
curvature, with one density; the same with a density for each weight; the same beside removed heads and neurons. Test
rows are seen by no search. No training follows. Times: one call of 1 x 128 tokens, all models in turn, one thread.

    python benchmarks/search_sparse.py --out benchmarks/results/DATE-search-sparse.md
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from kernels_layer import head

from secateur.data.table import Table
from secateur.jobs.demo import BATCH, FULL, LENGTH, demo_rows, dense_model
from secateur.jobs.open_task import look, open_host
from secateur.kernels.native import isa
from secateur.metrics.drop import drop
from secateur.plan import Plan
from secateur.pruning import prune
from secateur.repair import swaps
from secateur.search.levels import levels_of
from secateur.search.sparse.densities import Losses, choose_densities, density_losses, uniform_density, with_zeros
from secateur.search.sparse.mixed import SHARES, Mixed, choose_mixed, mixed_plan
from secateur.search.sparse.times import SparseTimes, compiled, in_turns, kernel_times
from secateur.search.stored import collected
from secateur.select import Element
from secateur.tasks import Batches, Options
from secateur.tasks.base.evaluate import Reference, evaluate
from secateur.tasks.base.task import Task
from secateur.torch.host import TorchHost

SEARCH_ROWS, TOKENS, TURNS = 512, 128, 25
ROWS = ("even, today's repair", "even, by curvature", "searched densities", "units and zeros")


@dataclass(frozen=True)
class Setting:
    """What all seeds share. batch: of the shape that is timed. search, test: the dense model on these rows."""

    host: TorchHost
    task: Task
    train: Table
    batch: dict[str, torch.Tensor]
    search: Reference
    test: Reference
    times: SparseTimes

    @property
    def names(self) -> tuple[str, ...]:
        """The linear weights that get zeros."""
        return self.times.names


def example() -> dict[str, torch.Tensor]:
    """A batch of one text of 128 tokens."""
    ids = torch.randint(1000, 20000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def setting(folder: Path, train: Table, test: Table) -> Setting:
    """The dense model, its outputs, and the times of models of its kind."""
    host, task = open_host(look(str(folder), None), Options(max_length=LENGTH))
    rows = [Batches(task, task.encode(table), BATCH) for table in (train.take(range(SEARCH_ROWS)), test)]
    search, tested = (Reference(task, host.model, batches) for batches in rows)
    times = kernel_times(host, example(), turns=TURNS)
    print(
        f"dense {times.dense_ms:.2f} ms, fixed {times.fixed:.2f} ms, {1e6 * times.per_weight:.2f} ns a weight",
        flush=True,
    )
    return Setting(host, task, train, example(), search, tested, times)


@dataclass(frozen=True)
class Plans:
    """The plans of one seed and density, by the names in `ROWS`; best: the candidate behind the last."""

    plans: dict[str, Plan]
    best: Mixed


def plans_of(at: Setting, seed: int, densities: list[float], calibration: int) -> Iterator[tuple[float, Plans]]:
    """For each density the plans at the latency of even zeros."""
    host, drawn = at.host, np.random.default_rng(seed).permutation(len(at.train) - SEARCH_ROWS)[:calibration]
    rows = Batches(at.task, at.task.encode(at.train.take(sorted((SEARCH_ROWS + drawn).tolist()))), BATCH)
    stats = collected(host, at.task, rows, weights=at.names, seed=seed)
    levels = levels_of(host, stats)
    cache: Losses = {}
    losses = density_losses(host, stats, Plan(), cache)
    for density in densities:
        kept = density * sum(losses.sizes.values())
        bound = at.times.of(host.layout, Plan(), dict.fromkeys(at.names, density))
        known = (levels, stats, at.times)
        best, seen = choose_mixed(host, at.task, at.search.batches, *known, bound, reference=at.search, cache=cache)
        print(f"  on search rows by share: {seen}; kept at the best: {dict(best.candidate.kept)}", flush=True)
        made = [
            prune(host, pattern=Element(), budget=1 - density, data=rows, repair=swaps, weights=at.names),
            with_zeros(host, stats, Plan(), uniform_density(losses, kept), swaps),
            with_zeros(host, stats, Plan(), choose_densities(losses, kept), swaps),
            mixed_plan(host, levels, stats, best.candidate, method=swaps),
        ]
        yield density, Plans(dict(zip(ROWS, made, strict=True)), best)


def lines_of(at: Setting, seed: int, density: float, plans: Plans) -> Iterator[str]:
    """A line of the table for each plan."""
    dense = at.test.evaluation()
    fast = {name: compiled(at.host, plan, at.batch, TOKENS) for name, plan in plans.plans.items()}
    whole, *took = in_turns([partial(model, **at.batch) for model in (at.host.model, *fast.values())], TURNS)
    for (name, model), ms in zip(fast.items(), took, strict=True):
        result = evaluate(at.task, model, at.test.batches, at.test)
        assert dense.main is not None
        assert dense.table is not None
        assert result.table is not None
        lost = drop(dense.main, dense.table, result.table)
        low, high = lost.interval or (np.nan, np.nan)
        share = f"{plans.best.share:.0%}" if name == ROWS[-1] else ""
        yield (
            f"| {density:.0%} | {seed} | {name} | {share} | {ms:.2f} | {ms / whole:.3f} | {result.kl:.4f} | "
            f"{lost.drop:+.3f} [{low:+.3f}, {high:+.3f}] |"
        )


def main() -> None:
    """Run all seeds and densities, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent.parent / ".cache" / "demo")
    parser.add_argument("--model", type=Path, help="a trained model, in place of the one that the cache holds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--density", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--calibration", type=int, default=512, help="rows of the statistics")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    train, test = demo_rows(FULL)
    at = setting(options.model or dense_model(FULL, options.cache, train, progress=False)[0], train, test)
    dense, lines = at.test.evaluation(), []
    for seed in options.seeds:
        for density, plans in plans_of(at, seed, options.density, options.calibration):
            for line in lines_of(at, seed, density, plans):
                lines.append(line)
                print(line, f"{time.process_time() - start:.0f} s", flush=True)
    text = [
        *head(f"Zeros, and units with zeros, at equal latency, one thread, kernels: {isa()}"),
        f"MiniLM on movie reviews, {dense.values[dense.metric]:.3f} accurate on {dense.rows} test rows; "
        f"{options.calibration} calibration rows; {at.times.dense_ms:.1f} ms dense. Largest error of the times that "
        f"the search expects: {at.times.error:.1%}. Shares of the time that units may give up: "
        f"{', '.join(f'{share:.0%}' for share in SHARES)}.",
        "",
        "| time of even zeros at | seed | | time that units gave up | ms | of dense | KL | accuracy drop, 95% |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    if options.out:
        options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
