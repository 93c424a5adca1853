"""SmolLM2-135M on llama.cpp: fewer units beside fewer bits, speed and quality in one table.

    python benchmarks/gguf_smollm2.py prune [--share 0.25]
    python benchmarks/gguf_smollm2.py run [--formats f16,q8_0,q4_0] [--threads 1,2]
    python benchmarks/gguf_smollm2.py --write

The first line prunes by secateur's search and distils, as search_llm.py does with `--heal`, and keeps the folder; the
second exports the dense and the pruned model, times them in turn on llama.cpp, and scores models whose weights are
rounded by llama.cpp's code as in the files (activations stay float32); the third writes the dated Markdown.
"""

import argparse
import copy
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import search_llm
import search_models
from setting import setting

from secateur.deploy.gguf.export import export_gguf
from secateur.deploy.gguf.generate import speeds
from secateur.deploy.gguf.rounded import round_weights
from secateur.torch.files.saving import save
from secateur.torch.open import load_model

KEPT = search_models.CACHE / "gguf"
WINDOWS, CONTEXT = 8, 256
PROMPT, NEW_TOKENS, TURNS = 128, 64, 7


def prune(share: float) -> None:
    """Keep the pruned and distilled model as a folder."""
    have = search_llm.material()
    windows = have.windows(WINDOWS, CONTEXT, 0)
    small = search_llm.ours(have, windows, share)
    steps = have.windows(search_llm.STEPS, search_llm.STEP_TOKENS, search_llm.HEALING_SEED)
    search_llm.heal(have, small, steps)
    save(small.model, KEPT / f"pruned-{share:g}", tokenizer=have.tokenizer, overwrite=True)


def rounded(model: Any, name: str) -> Any:
    """A copy whose matrices are those that a file of this format gives back."""
    small = copy.deepcopy(model)
    round_weights(small, name)
    return small


def run(formats: list[str], threads: list[int]) -> None:
    """Export, time and score; keeps one JSON file. Rows that are there with their artefacts are only timed again."""
    have = search_llm.material()
    folders: dict[str, Path] = {"dense": search_models.smollm2()}
    folders |= {path.parent.name: path.parent for path in sorted(KEPT.glob("pruned-*/config.json"))}
    artefacts: dict[str, Path] = {}
    kept = KEPT / "found.json"
    before = json.loads(kept.read_text())["rows"] if kept.is_file() else {}
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        model: Any = load_model(folder).float().eval()
        for form in formats:
            title = f"{name} {form}"
            artefacts[title] = KEPT / "artefacts" / title.replace(" ", "-")
            if title in before and artefacts[title].is_dir():
                found[title] = {name: before[title][name] for name in ("bytes", "scores")}
                continue
            artefact = export_gguf(folder, artefacts[title], quantize=form, overwrite=True, say=print)
            scores = search_llm.scores(have, rounded(model, form))
            found[title] = {"bytes": artefact.bytes, "scores": scores}
            deltas = {text: round(float(np.mean(one["delta"])), 4) for text, one in scores.items()}
            print(title, artefact.bytes, deltas, flush=True)
            kept.write_text(json.dumps({"threads": threads, "rows": {**before, **found}}, indent=1))
    for count in threads:
        timed = speeds(artefacts, PROMPT, NEW_TOKENS, threads=count, turns=TURNS)
        for title, speed in timed.items():
            found[title][f"threads-{count}"] = {"prompt": speed.prompt, "decode": speed.decode}
            print(title, count, speed, flush=True)
    kept.write_text(json.dumps({"threads": threads, "rows": found}, indent=1))


def cells(title: str, row: Mapping[str, Any], first: Mapping[str, Any], threads: list[int]) -> str:
    """A line of the table; speeds also as ratios to the first row's."""
    parts = [title, f"{row['bytes'] / 1e6:.1f}"]
    for count in threads:
        own, base = row[f"threads-{count}"], first[f"threads-{count}"]
        parts += [f"{own[what]:.0f} ({own[what] / base[what]:.2f})" for what in ("prompt", "decode")]
    for text in search_llm.TESTS:
        scores = row["scores"][text]
        parts += [f"{search_llm.said(scores['delta'])}", f"{np.mean(scores['kl']):.3f}"]
    return f"| {' | '.join(parts)} |"


def write() -> Path:
    """The Markdown."""
    kept = json.loads((KEPT / "found.json").read_text())
    threads, rows = kept["threads"], kept["rows"]
    columns = ["model", "MB"]
    for count in threads:
        word = f"{count} thread{'s' if count > 1 else ''}"
        columns += [f"prompt tokens/s, {word} (ratio)", f"tokens/s, {word} (ratio)"]
    for text in search_llm.TESTS:
        columns += [f"delta NLL, {text}", f"KL, {text}"]
    first = next(iter(rows.values()))
    commands = "`python benchmarks/gguf_smollm2.py prune`, `run`, then `--write`"
    lines = [
        "# SmolLM2-135M on llama.cpp: fewer units beside fewer bits",
        "",
        setting(commands, ("torch", "transformers", "gguf", "xllamacpp")),
        "",
        f"Pruned: secateur's search on {WINDOWS} windows of {CONTEXT} tokens, then {search_llm.STEPS} steps of "
        "distillation; the number is the share of the blocks' parameters that went. Speeds: medians of "
        f"{TURNS} turns, all models in turn, {PROMPT} tokens read and {NEW_TOKENS} written; llama.cpp is the wheel's, "
        "compiled for any x86 processor. Delta: negative log-likelihood minus the dense float32 model's, in nats, "
        "95% interval over 16 windows of each text, with weights rounded as in the file and float32 activations.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(cells(title, row, first, threads) for title, row in rows.items()),
    ]
    path = Path(__file__).parent / "results" / f"{datetime.date.today()}-gguf-smollm2.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["prune", "run"])
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--formats", default="f16,q8_0,q4_0")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if options.what == "prune":
        prune(options.share)
    if options.what == "run":
        run(options.formats.split(","), [int(count) for count in options.threads.split(",")])
    if options.write:
        print(write())


if __name__ == "__main__":
    main()
