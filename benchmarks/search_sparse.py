"""Zeros alone against units and zeros together, at equal latency on our sparse kernels: MiniLM that reads reviews.

At the latency that even zeros take at each density: today's repair with one density; a repair that looks at the
curvature, with one density; the same with a density for each weight; the same beside removed heads and neurons. Test
rows are seen by no search. No training follows. Times: one call of 1 x 128 tokens, all models in turn, one thread.

    python benchmarks/search_sparse.py --cache .cache/demo --out benchmarks/results/DATE-search-sparse.md
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_layer import head

from secateur.jobs.demo import BATCH, FULL, LENGTH, demo_rows, dense_model
from secateur.jobs.open_task import look, open_host
from secateur.kernels.native import isa
from secateur.metrics.drop import drop
from secateur.plan import Plan
from secateur.pruning import default_weights, prune
from secateur.repair import sparsegpt, swaps
from secateur.search.densities import choose_densities, density_losses, uniform_density, with_zeros
from secateur.search.levels import levels_of
from secateur.search.mixed import best_mixed, mixed_candidates, mixed_plan
from secateur.search.sparse_times import compiled, in_turns, sparse_times
from secateur.search.stored import collected
from secateur.search.trial import Trial
from secateur.select import Element
from secateur.tasks import Batches, Options
from secateur.tasks.base.evaluate import Reference, evaluate

SEARCH_ROWS, TOKENS = 512, 128
ROWS = ("even, today's repair", "even, by curvature", "searched densities", "units and zeros")


def example(model: Any) -> dict[str, torch.Tensor]:
    """A batch of one text of 128 tokens."""
    ids = torch.randint(1000, 20000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


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
    train, test = demo_rows(FULL)
    folder = options.model or dense_model(FULL, options.cache, train, progress=False)[0]
    host, task = open_host(look(str(folder), None), Options(max_length=LENGTH))
    batch = example(host.model)
    encoded = task.encode(train)
    search = Batches(task, encoded.take(SEARCH_ROWS), BATCH)
    reference, tested = (
        Reference(task, host.model, rows) for rows in (search, Batches(task, task.encode(test), BATCH))
    )
    dense = tested.evaluation()
    names = default_weights(host.layout)
    times = sparse_times(host, names, batch, TOKENS)
    print(times.__class__.__name__, f"dense {times.dense_ms:.2f} ms, fixed {times.fixed:.2f}, error {times.error:.3f}")
    print({axis: round(ms * 1e3, 2) for axis, ms in times.per_unit.items()}, times.per_weight * 1e6, flush=True)
    lines = []
    for seed in options.seeds:
        chosen = SEARCH_ROWS + np.random.default_rng(seed).permutation(len(train) - SEARCH_ROWS)[: options.calibration]
        rows = Batches(task, task.encode(train.take(sorted(chosen.tolist()))), BATCH)
        start = time.process_time()
        stats = collected(host, task, rows, weights=names, seed=seed)
        levels = levels_of(host, stats)
        print(f"statistics and levels: {time.process_time() - start:.0f} s", flush=True)
        cache: dict[Any, np.ndarray] = {}
        trial = Trial(
            host, task, search, lambda c: mixed_plan(host, levels, stats, c, method=sparsegpt), reference=reference
        )
        for density in options.density:
            kept = density * sum(np.prod(host.layout.shape(name)) for name in names)
            bound = times.of(host.layout, Plan(), dict.fromkeys(names, density))
            losses = density_losses(host, stats, Plan(), cache)
            found = mixed_candidates(host, levels, stats, times, bound, cache=cache)
            best, seen = best_mixed(found, trial.divergence)
            for one in found:
                print(f"  share {one.share}: expected {one.loss:.4f}, on search rows {seen[one.share]:.4f}", flush=True)
            print({a: n for a, n in best.candidate.kept.items()}, flush=True)
            plans: dict[str, Callable[[], Plan]] = {
                ROWS[0]: lambda: prune(host, pattern=Element(), budget=1 - density, data=rows, repair=swaps),
                ROWS[1]: lambda: with_zeros(host, stats, Plan(), uniform_density(losses, kept), swaps),
                ROWS[2]: lambda: with_zeros(host, stats, Plan(), choose_densities(losses, kept), swaps),
                ROWS[3]: lambda: mixed_plan(host, levels, stats, best.candidate, method=swaps),
            }
            fast = {name: compiled(host, make(), batch, TOKENS) for name, make in plans.items()}
            took = in_turns([lambda m=m: m(**batch) for m in (host.model, *fast.values())], 25)
            for (name, model), ms in zip(fast.items(), took[1:], strict=True):
                result = evaluate(task, model, tested.batches, tested)
                lost = drop(dense.main, dense.table, result.table)
                low, high = lost.interval
                share = f"{best.share:.0%}" if name == ROWS[3] else ""
                lines.append(
                    f"| {density:.0%} | {seed} | {name} | {share} | {ms:.2f} | {ms / took[0]:.3f} | {result.kl:.4f} | "
                    f"{lost.drop:+.3f} [{low:+.3f}, {high:+.3f}] |"
                )
                print(lines[-1], f"{time.process_time() - start:.0f} s", flush=True)
    text = [
        *head(f"Zeros, and units with zeros, at equal latency, one thread, kernels: {isa()}"),
        f"MiniLM on movie reviews, {dense.values[dense.metric]:.3f} accurate on {dense.rows} test rows; "
        f"{options.calibration} calibration rows; {times.dense_ms:.1f} ms dense. Time model: largest error "
        f"{times.error:.1%}.",
        "",
        "| time of even zeros at | seed | | time that units gave up | ms | of dense | KL | accuracy drop, 95% |",
        "|---|---|---|---|---|---|---|---|",
        *lines,
    ]
    if options.out:
        options.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
