"""Decoding of a language model pruned in blocks of 8 x 1 or N:M: tokens per second on secateur's kernels, in torch and
in ONNX Runtime, against the dense model in torch and in ONNX Runtime in float32 and int8, with the perplexity of each.

Each side decodes by its own cached loop (transformers' generate, secateur.deploy.generator), greedily, after the same
prompt, in turns and in one process. Programs and scores take long and are cached under .cache/kernels_llm; the table
itself takes two minutes. Run pinned to as many cores as threads:

    taskset -c 0 python benchmarks/kernels_llm.py DENSE PRUNED... --text TEXT --step programs  # what is missing
    taskset -c 0 python benchmarks/kernels_llm.py DENSE PRUNED... --text TEXT --step scores
    taskset -c 0 python benchmarks/kernels_llm.py DENSE PRUNED... --text TEXT --out benchmarks/results/...

DENSE and PRUNED are model folders (`secateur prune DENSE --pattern 8x1 --sparsity 0.5 --calibration ...`); TEXT is text
that no calibration has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels_layer import head

from secateur import deploy, runtime
from secateur.deploy import runner
from secateur.deploy.onnx_graph import int8, sparse
from secateur.deploy.target import Written
from secateur.documents import read_documents
from secateur.files import new_folder, write_json
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.data.token_windows import cut, tokens_of
from secateur.torch.open import load_model

CACHE = Path(__file__).parent.parent / ".cache" / "kernels_llm"
PROMPT, NEW_TOKENS = 16, 24
"""Tokens before, and tokens that are timed."""
GREEDY = 48
"""Tokens of which the agreement with torch is counted."""
CONTEXT, WINDOWS = 256, 8
VALUES = ("float16", "int8")
Decode = Callable[[np.ndarray, int], np.ndarray]
"""Prompt (1, tokens) and how many to add -> all tokens, where texts do not end."""


def windows(folder: Path, text: Path) -> np.ndarray:
    """(windows, context) token ids of the text, without the end-of-text token, at which generation would stop."""
    tokenizer, need = load_tokenizer(folder), CONTEXT * WINDOWS
    ids = tokens_of(tokenizer, read_documents(text), 1 << 30, 2 * need)
    return cut([i for i in ids if i != tokenizer.eos_token_id], CONTEXT, str(text), WINDOWS).numpy()


def names(dense: Path, pruned: list[Path]) -> dict[str, tuple[Path, str]]:
    """The sides: name -> (folder of the model, where its program lies or the word torch)."""
    sides = {
        f"{dense.name}, torch float32": (dense, "torch"),
        f"{dense.name}, ONNX Runtime float32": (dense, f"{dense.name}-float32"),
        f"{dense.name}, ONNX Runtime int8": (dense, f"{dense.name}-int8"),
    }
    for folder in pruned:
        for value in VALUES:
            sides[f"{folder.name}, torch on the kernels, {value}"] = (folder, f"{folder.name}-{value}-torch")
            sides[f"{folder.name}, ONNX Runtime on the kernels, {value}"] = (folder, f"{folder.name}-{value}")
    return sides


def make_programs(dense: Path, pruned: list[Path]) -> None:
    """Export and compile what is missing. Each model is exported once; what is stored how is changed in a copy, by what
    `secateur export --generate --int8` and `--generate --sparse --tokens 1 --value float16 --int8` do.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    for folder in (dense, *pruned):
        plain = CACHE / f"{folder.name}-float32"
        if not plain.exists():
            print(plain.name, deploy.export(folder, "onnx", plain, generate=True).generation, flush=True)
        for value in ("int8",) if folder == dense else VALUES:
            if not (CACHE / f"{folder.name}-{value}").exists():
                restore(plain, CACHE / f"{folder.name}-{value}", None if folder == dense else value)
            compiled = CACHE / f"{folder.name}-{value}-torch"
            if folder != dense and not compiled.exists():
                model = load_model(folder, dtype=torch.float32).eval()
                options = {"tokens": 1, "value": value, "dense": "int8", "measure": False}
                example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
                runtime.save(runtime.compile(model, example=example, **options), compiled)


def restore(plain: Path, output: Path, value: str | None) -> None:
    """A copy of an artefact with int8 weights; with a value, its sparse layers packed as that, and the rest int8."""
    with new_folder(output) as folder:
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        info = json.loads((folder / runner.MANIFEST).read_text())
        (graph,) = info["graphs"].values()
        if value is not None:
            written = {"decode": Written(graph["files"], graph["outputs"])}
            info["sparse"] = sparse.rewrite(written, folder, tokens=1, value=value, measure=False)
            graph["operators"] = runner.OPERATORS
        int8.quantise(folder / graph["files"][0])
        info["sizes"] = {file: (folder / file).stat().st_size for file in graph["files"]}
        info["sha256"] = {file: runner.digest(folder / file) for file in graph["files"]}
        write_json(folder / runner.MANIFEST, info)


def torch_decode(model: Any) -> Decode:
    """By transformers' generate."""

    def decode(prompt: np.ndarray, count: int) -> np.ndarray:
        ids = torch.from_numpy(prompt)
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            return np.asarray(model.generate(ids, attention_mask=torch.ones_like(ids), **given))

    return decode


def onnx_decode(folder: Path, threads: int) -> Decode:
    """By secateur's loop; the score of the end-of-text token is masked, as `generate` does."""
    run, end = deploy.generator(folder, threads=threads), runner.read(folder)["generation"]["end"]

    def forbid(scores: np.ndarray) -> None:
        scores[:, end] = -np.inf

    return lambda prompt, count: run({"input_ids": prompt}, count, on_logits=forbid)


def open_side(folder: Path, program: str, threads: int) -> Decode:
    """The loop of one side."""
    if program == "torch":
        return torch_decode(load_model(folder, dtype=torch.float32).eval())
    if program.endswith("-torch"):
        return torch_decode(runtime.load(CACHE / program))
    return onnx_decode(CACHE / program, threads)


def scored(logits: np.ndarray, row: np.ndarray) -> tuple[list[float], list[int]]:
    """Losses and most likely tokens of logits (tokens - 1, vocabulary) of a window."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    right = shifted[np.arange(len(row) - 1), row[1:]]
    return list(np.log(np.exp(shifted).sum(-1)) - right), [int(i) for i in logits.argmax(-1)]


def score(folder: Path, program: str, tokens: np.ndarray, threads: int) -> dict[str, Any]:
    """Perplexity of a side as it runs, its most likely token everywhere, and what it writes after the prompt.

    torch sees a window at once. Programs see it token by token through the cache, as in decoding, because dynamic int8
    rounds activations with one scale for all tokens of a call.
    """
    losses: list[float] = []
    best: list[int] = []
    if program.endswith("torch"):
        model = load_model(folder, dtype=torch.float32).eval() if program == "torch" else runtime.load(CACHE / program)
        for row in tokens:
            with torch.inference_mode():
                logits = model(torch.from_numpy(row)[None]).logits[0, :-1].numpy()
            for values, new in zip((losses, best), scored(logits, row), strict=True):
                values += new  # type: ignore[arg-type]
        decode = torch_decode(model)
    else:
        run = deploy.generator(CACHE / program, threads=threads)
        for row in tokens:
            seen: list[np.ndarray] = []

            def force(scores: np.ndarray, row: np.ndarray = row, seen: list[np.ndarray] = seen) -> None:
                seen.append(scores[0].copy())
                scores[0, row[len(seen)]] = np.inf

            run({"input_ids": row[None, :1]}, len(row) - 1, on_logits=force)
            for values, new in zip((losses, best), scored(np.stack(seen), row), strict=True):
                values += new  # type: ignore[arg-type]
        decode = onnx_decode(CACHE / program, threads)
    written = decode(tokens[:1, :PROMPT], GREEDY)[0, PROMPT:]
    return {"perplexity": math.exp(float(np.mean(losses))), "best": best, "greedy": [int(i) for i in written]}


def make_scores(sides: dict[str, tuple[Path, str]], tokens: np.ndarray, threads: int) -> dict[str, Any]:
    """Scores of all sides and of each pruned model in float32 torch; scores of an earlier run are read."""
    store = CACHE / "scores"
    store.mkdir(exist_ok=True)
    twins = {f"{folder.name}, torch float32": (folder, "torch") for folder, _ in sides.values()}
    scores = {}
    for name, (folder, program) in {**twins, **sides}.items():
        path = store / f"{name}.json"
        if not path.exists():
            write_json(path, score(folder, program, tokens, threads))
        scores[name] = json.loads(path.read_text())
        print(f"{name}: {scores[name]['perplexity']:.1f}", flush=True)
    return scores


def tokens_per_second(sides: dict[str, Decode], prompt: np.ndarray, turns: int) -> dict[str, list[float]]:
    """Greedy decoding after a prompt, the prompt's own time taken off: rates of each turn, one for warming left out."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, decode in sides.items():
            took = []
            for count in (1, 1 + NEW_TOKENS):
                start = time.perf_counter()
                decode(prompt, count)
                took.append(time.perf_counter() - start)
            if turn:
                rates[name].append(NEW_TOKENS / (took[1] - took[0]))
    return rates


def profile(folder: Path, prompt: np.ndarray, threads: int) -> dict[str, float]:
    """Milliseconds a token of a program by part: sparse layers, dense layers, output layer, the other operators.

    ONNX Runtime's own profile of NEW_TOKENS steps after the prompt; taking it makes each operator a little slower.
    """
    import onnxruntime

    kept: list[Any] = []
    plain = onnxruntime.InferenceSession

    def profiled(path: str, options: Any, **more: Any) -> Any:
        options.enable_profiling, options.profile_file_prefix = True, str(CACHE / "profile")
        kept.append(plain(path, options, **more))
        return kept[-1]

    onnxruntime.InferenceSession = profiled
    try:
        onnx_decode(folder, threads)(prompt, 1 + NEW_TOKENS)
    finally:
        onnxruntime.InferenceSession = plain
    log = Path(kept[0].end_profiling())
    events = json.loads(log.read_text())
    log.unlink()
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    words = json.loads((folder / "config.json").read_text())["vocab_size"]
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time") or event["ts"] < starts[1]:
            continue
        kind, shapes = event["args"]["op_name"], event["args"].get("output_type_shape", [])
        part = "other"
        if kind == "SparseLinear":
            part = "sparse layers"
        elif any(sizes and sizes[-1] == words for shape in shapes for sizes in shape.values()):
            part = "output layer"
        elif "MatMul" in kind and any(len(sizes) == 3 for shape in shapes for sizes in shape.values()):
            part = "dense layers"
        parts[part] += event["dur"] / 1000 / NEW_TOKENS
        parts["operators"] += 1 / NEW_TOKENS
    return dict(parts)


def table(
    sides: dict[str, tuple[Path, str]], scores: dict[str, Any], rates: dict[str, list[float]], dense: Path
) -> list[str]:
    """A line for each side."""
    baselines = [f"{dense.name}, torch float32", f"{dense.name}, ONNX Runtime int8"]
    lines = [
        "| model | tokens per second | of dense torch | of dense int8 | perplexity | greedy tokens | most likely | MB |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, (folder, program) in sides.items():
        ratios = [float(np.median(np.divide(rates[name], rates[base]))) for base in baselines]
        twin = scores[f"{folder.name}, torch float32"]
        equal = np.equal(scores[name]["greedy"], twin["greedy"])
        first = len(equal) if equal.all() else int(equal.argmin())
        agreement = np.mean(np.equal(scores[name]["best"], twin["best"]))
        place = folder if program == "torch" else CACHE / program
        size = sum(f.stat().st_size for f in place.iterdir() if f.suffix in (".safetensors", ".onnx", ".data"))
        lines.append(
            f"| {name} | {np.median(rates[name]):.1f} | {ratios[0]:.2f} | **{ratios[1]:.2f}** | "
            f"{scores[name]['perplexity']:.1f} | {first} of {GREEDY} | {agreement:.3f} | {size / 1e6:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Export, score, decode and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("pruned", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--step", choices=("programs", "scores"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides, tokens = names(args.dense, args.pruned), windows(args.dense, args.text)
    make_programs(args.dense, args.pruned)
    if args.step == "programs":
        return
    scores = make_scores(sides, tokens, args.threads)
    if args.step == "scores":
        return
    opened = {name: open_side(*side, args.threads) for name, side in sides.items()}
    rates = tokens_per_second(opened, tokens[:1, :PROMPT], args.turns)
    lines = head(f"Decoding one token at a time, {args.threads} thread(s), kernels: {runtime.isa()}")
    lines += [
        f"Tokens per second: medians of {args.turns} turns of {NEW_TOKENS} tokens after a prompt of {PROMPT}, whose "
        "time is taken off; ratios are medians of those of the same turn. Perplexity: of what runs, weights rounded as "
        f"they are, on {WINDOWS} windows of {CONTEXT} tokens that no calibration has seen. Agreement with torch in "
        "float32 of the same model: greedy tokens equal before the first that differs, and the share of the "
        f"{WINDOWS} windows' positions where the most likely next token is the same. MB: weights on disk.",
        "",
        *table(sides, scores, rates, args.dense),
        "",
        "Where a token's time goes in ONNX Runtime, in ms, by its own profile (which costs time at each operator):",
        "",
        "| program | sparse layers | dense layers | output layer | other | operators |",
        "|---|---|---|---|---|---|",
    ]
    for _, program in sides.values():
        if not program.endswith("torch"):
            parts = profile(CACHE / program, tokens[:1, :PROMPT], args.threads)
            columns = ("sparse layers", "dense layers", "output layer", "other")
            cells = [f"{parts[part]:.2f}" if part in parts else "-" for part in columns]
            lines.append(f"| {program} | " + " | ".join(cells) + f" | {parts['operators']:.0f} |")
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
