"""Damages files and has every reader read them.

    python -m tests.fuzz --minutes 5 [--format plan] [--seed 7]     for so long, shared by all formats
    python -m tests.fuzz --sample 1.0 [--light]                     a fixed number of cases of each format
    python -m tests.fuzz --corpus [--settle]                        the kept cases once more

Ends with 1 when a reader did what it must not do and no kept case is open for it. `--keep` keeps such finds.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TF_CPP_MIN_LOG_LEVEL="3")
os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

from tests.fuzz import corpus, run
from tests.fuzz.run import Format, Result


def formats(*, light: bool, named: Iterable[str] = ()) -> list[Format]:
    """The table of formats: those that need no torch, all, or those that are named."""
    from tests.fuzz.formats import HEAVY, LIGHT

    if light:
        return list(LIGHT)
    from tests.fuzz.models import KERAS, MODELS  # imports torch

    every = [*LIGHT, *HEAVY, *MODELS, *KERAS]
    named = set(named)
    unknown = named - {form.name for form in every}
    if unknown:
        raise SystemExit(f"no format {', '.join(sorted(unknown))}; there is {', '.join(form.name for form in every)}")
    return [form for form in every if (form.name in named if named else not form.alone)]


def quiet() -> None:
    """Keep the libraries that read models from printing."""
    if importlib.util.find_spec("transformers") is None:
        return
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def hunt(options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """Damage and read; the results, and the keys of finds that no kept case is open for."""
    chosen = formats(light=options.light, named=options.format)
    known = {entry["key"] for entry in map(corpus.read, corpus.files()) if "open" in entry}
    results, fresh = [], []
    for number, form in enumerate(chosen):
        seconds = None if options.sample else max(1.0, (options.end - time.monotonic()) / (len(chosen) - number))
        cases = max(1, round(form.sample * options.sample)) if options.sample else options.cases
        with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as work:
            result = run.run(form, options.seed, Path(work), cases=cases, seconds=None if cases else seconds)
        results.append(result)
        print(
            f"{form.name}: {result.cases} cases in {result.seconds:.0f} s, {result.loaded} loaded, {result.refused} "
            f"refused, {sum(result.times.values())} wrong in {len(result.finds)} ways",
            flush=True,
        )
        for key, found in result.finds.items():
            is_known = key in known
            print(f"  {'known' if is_known else 'NEW'} {key} ({result.times[key]} times, case {found.number} of seed "
                  f"{options.seed}): {found.what} at {found.where}; {found.origin}: {found.said[:200]}")  # fmt: skip
            if not is_known:
                fresh.append(key)
                if options.keep:
                    print(f"    kept as {corpus.keep(form, found).name}")
    return results, fresh


def replay(options: argparse.Namespace) -> dict[str, Any]:
    """Read the kept cases: file -> 'loaded', 'refused', or what went wrong."""
    entries = {path: corpus.read(path) for path in corpus.files()}
    chosen = formats(light=options.light, named=options.format)
    outcomes: dict[str, Any] = {}
    for form in chosen:
        mine = [path for path, entry in entries.items() if entry["format"] == form.name]
        if not mine:
            continue
        seeds = form.seeds()
        with tempfile.TemporaryDirectory(prefix="secateur-fuzz-") as folder:
            work = Path(folder)
            for case in seeds.values():
                run.attempt(form, case, work)
            cases = [corpus.case_of(entries[path], seeds) for path in mine]
            for number, outcome in run.in_child(form, cases.__getitem__, range(len(mine)), work):
                path = mine[number]
                outcomes[path.name] = outcome
                if options.settle and "open" in entries[path]:
                    corpus.settle(path, outcome)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, all formats together")
    parser.add_argument("--cases", type=int, help="how many cases of each format, however long they take")
    parser.add_argument("--sample", type=float, help="how many times the sample of each format")
    parser.add_argument("--format", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--light", action="store_true", help="only formats that need no torch")
    parser.add_argument("--keep", action="store_true", help="keep new finds in tests/fuzz/corpus")
    parser.add_argument("--corpus", action="store_true", help="read the kept cases")
    parser.add_argument("--settle", action="store_true", help="with --corpus: close what is mended, name anew the rest")
    parser.add_argument("--limit", type=int, default=run.SECONDS, help="seconds that a reader may take")
    parser.add_argument("--json", type=Path, help="write the outcome here")
    options = parser.parse_args(arguments)
    run.SECONDS, run.SILENCE = options.limit, 4 * options.limit
    options.end = time.monotonic() + 60 * options.minutes
    if not options.light:
        quiet()
    said: dict[str, Any]
    if options.corpus:
        said = replay(options)
        wrong = {name: outcome for name, outcome in said.items() if isinstance(outcome, dict)}
        print(f"{len(said)} kept cases, {len(wrong)} wrong")
        fresh = [name for name in wrong if "open" not in corpus.read(corpus.HERE / name)]
    else:
        results, fresh = hunt(options)
        said = {r.format: {"cases": r.cases, "seconds": r.seconds, "finds": r.times} for r in results}
    if options.json:
        options.json.write_text(json.dumps(said, indent=1), encoding="utf-8")
    for name in fresh:
        print(f"wrong and not known: {name}", file=sys.stderr)
    return 1 if fresh else 0


if __name__ == "__main__":
    sys.exit(main())
