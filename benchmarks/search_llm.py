"""Structured pruning of SmolLM2-135M, one shot and after a short distillation, beside published methods.

    python benchmarks/search_llm.py run [METHOD ...] [--shares 0.15,0.25,0.4] [--seeds 0] [--heal] \
        [--windows 16] [--context 512]
    python benchmarks/search_llm.py --write

The first line keeps a row for each method, share and seed under .cache/search/llm; the second writes the dated Markdown
from all of them. Every method gets the same calibration windows: half film reviews, half sections of the Python manual.
Test windows come from other film reviews and from news, which no calibration text is like. Methods are those of
search_baselines.py. `--heal` adds 40 steps of distillation to each row. Seconds are CPU time of one thread, without
loading and testing.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import search_baselines as baselines
import search_models
import search_ours
import tasks_sources
import torch
from llm_quality import texts
from setting import setting

from secateur.cost import parameters
from secateur.files import write_json
from secateur.scores import interval_of
from secateur.torch.data.run_windows import Answers, divergences, evaluate_text, logits_of, recorded
from secateur.torch.data.text_rows import load_tokenizer
from secateur.torch.data.token_windows import cut, sample_windows, tokens_of
from secateur.torch.host import TorchHost
from secateur.torch.open import load_model

HERE = Path(__file__).parent
KEPT = search_models.CACHE / "llm"
TEST_CONTEXT, TEST_WINDOWS, SPREAD = 160, 16, 20
"""Tokens of a test window, how many windows a text has, and that one in so many is taken."""
STEPS, STEP_TOKENS, RATE, WARM_UP = 40, 256, 1e-4, 4
"""Of distillation: steps, tokens of each, the highest learning rate, and steps until it is reached."""
HEALING_SEED = 1000
TESTS = ("reviews", "news")


# -- texts ------------------------------------------------------------------------------------------------------------


def manual() -> list[str]:
    """Sections of the Python reference manual, which comes with Python."""
    return [topics.topics[name] for name in sorted(topics.topics)]


@dataclass(frozen=True)
class Material:
    """The dense model, its host, its answers on the test windows, these by name, and what calibration is drawn from."""

    host: TorchHost
    answers: Answers
    tests: Mapping[str, torch.Tensor]
    tokenizer: Any
    sources: Sequence[tuple[str, list[str]]]

    @property
    def model(self) -> Any:
        """The dense model."""
        return self.host.model

    def windows(self, count: int, context: int, seed: int) -> torch.Tensor:
        """Calibration windows (count, context)."""
        return sample_windows(self.tokenizer, self.sources, self.model.config.vocab_size, count, context, seed)


def material() -> Material:
    """Everything that the rows share."""
    folder = search_models.smollm2()
    tasks_sources.python_package("gensim")
    model: Any = load_model(folder).eval()
    tokenizer, text_by_name = load_tokenizer(folder), texts()
    tests = {}
    for name in TESTS:
        need = TEST_CONTEXT * TEST_WINDOWS * SPREAD
        tokens = tokens_of(tokenizer, text_by_name[name], model.config.vocab_size, need)
        all_windows = cut(tokens, TEST_CONTEXT, name)
        tests[name] = all_windows[:: len(all_windows) // TEST_WINDOWS][:TEST_WINDOWS]
    example = torch.zeros(2, 16, dtype=torch.long)
    host = TorchHost(model, {"input_ids": example, "attention_mask": torch.ones_like(example)})
    sources = [("reviews", text_by_name["calibration"]), ("manual", manual())]
    return Material(host, recorded(model, torch.cat(list(tests.values()))), tests, tokenizer, sources)


# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A pruned model. gone: share of the blocks' parameters that went. hold: sets to zero what has to stay zero."""

    model: Any
    gone: float
    hold: Callable[[], None]


def masked(have: Material, pruned: baselines.Pruned) -> Small:
    """The model of a method of search_baselines.py."""
    small = baselines.applied(have.model, pruned)

    def hold() -> None:
        for key, kept in pruned.kept.items():
            baselines.write(small, key, kept, None, None)

    return Small(small, baselines.share_gone(baselines.sizes_of(small), pruned), hold)


def ours(have: Material, windows: torch.Tensor, share: float) -> Small:
    """The search of secateur, on the same windows."""
    gone = round(share * baselines.sizes_of(have.model).total)
    found = search_ours.decoder(have.host, have.tokenizer, windows, gone, 0, print)
    print(found.chosen, flush=True)
    before, after = (parameters(have.host.layout, plan).total for plan in (None, found.plan))
    return Small(found.host.model, (before - after) / baselines.sizes_of(have.model).total, lambda: None)


@dataclass(frozen=True)
class Method:
    """A row of the table. run: the pruned model, from windows and the share that goes."""

    title: str
    run: Callable[[Material, torch.Tensor, float], Small]


METHODS = {
    "ours": Method("secateur's search", ours),
    "taylor": Method(
        "Taylor, global",
        lambda have, windows, share: masked(have, baselines.taylor(have.host, windows, share)),
    ),
    "flap": Method(
        "FLAP", lambda have, windows, share: masked(have, baselines.flap(have.model, windows, share))
    ),
    "2ssp": Method(
        "2SSP", lambda have, windows, share: masked(have, baselines.two_stage(have.model, windows, share))
    ),
    "obs": Method(
        "structured OBS (ZipLM), uniform, fed forward",
        lambda have, windows, share: masked(have, baselines.obs(have.model, windows, share)),
    ),
}  # fmt: skip


# -- distillation -----------------------------------------------------------------------------------------------------


def heal(have: Material, small: Small, windows: torch.Tensor) -> None:
    """Train the blocks of a pruned model on the dense model's next-token distributions, a window a step."""
    trained = [p for p in small.model.model.layers.parameters() if p.is_floating_point()]
    for parameter in small.model.parameters():
        parameter.requires_grad_(requires_grad=False)
    for parameter in trained:
        parameter.requires_grad_(requires_grad=True)
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
    for step, window in enumerate(windows):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM_UP, (len(windows) - step) / len(windows))
        with torch.no_grad():
            wanted = logits_of(have.model, window)
        divergences(logits_of(small.model, window), wanted).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        small.hold()


# -- rows -------------------------------------------------------------------------------------------------------------


def scores(have: Material, model: Any) -> dict[str, dict[str, list[float]]]:
    """For each test text and window: how much the loss rose against the dense model, and the KL divergence."""
    found = {}
    for name, windows in have.tests.items():
        each = [evaluate_text(model, window[None], have.answers) for window in windows]
        found[name] = {"delta": [s.delta for s in each], "kl": [s.kl for s in each]}
    return found


def run_row(have: Material, name: str, share: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Prune, score, and heal where that is asked for."""
    windows = have.windows(options.windows, options.context, seed)
    start = time.process_time()
    small = METHODS[name].run(have, windows, share)
    row = {"gone": small.gone, "seconds": time.process_time() - start, "oneshot": scores(have, small.model)}
    if options.heal:
        start = time.process_time()
        heal(have, small, have.windows(STEPS, STEP_TOKENS, HEALING_SEED + seed))
        row |= {"healing_seconds": time.process_time() - start, "healed": scores(have, small.model)}
    return row


def said(values: Sequence[float]) -> str:
    """A mean with its 95% interval over windows."""
    interval = interval_of(np.array(values))
    assert interval is not None
    return f"{np.mean(values):.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def cells(title: str, row: Mapping[str, Any], stage: str) -> list[str]:
    """A line of the table; seeds of a method count as more windows of the same text."""
    found = row[stage]
    deltas = [said(found[name]["delta"]) for name in TESTS]
    kls = [f"{np.mean(found[name]['kl']):.3f}" for name in TESTS]
    seconds = row["seconds"] + (row.get("healing_seconds", 0.0) if stage == "healed" else 0.0)
    return [title, f"{100 * row['gone']:.1f}%", *deltas, *kls, f"{seconds:.0f}"]


def stored(name: str, share: float, seed: int, options: argparse.Namespace) -> Path:
    """Where a row lies."""
    return KEPT / f"{name}-{share:g}-{seed}-{options.windows}x{options.context}.json"


def table(share: float, seeds: Sequence[int], options: argparse.Namespace) -> list[str]:
    """The rows of one share, one shot and then healed."""
    columns = ("method", "gone", *(f"delta NLL, {t}" for t in TESTS), *(f"KL, {t}" for t in TESTS), "seconds", "seed")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for stage, suffix in (("oneshot", ""), ("healed", f" + {STEPS} steps of distillation")):
        for name, method in METHODS.items():
            for seed in seeds:
                path = stored(name, share, seed, options)
                row = json.loads(path.read_text()) if path.exists() else {}
                if stage in row:
                    lines.append(f"| {' | '.join([*cells(method.title + suffix, row, stage), str(seed)])} |")
    return lines


def page(shares: Sequence[float], seeds: Sequence[int], options: argparse.Namespace) -> str:
    """The Markdown."""
    packages = ("torch", "transformers", "secateur")
    lines = [
        "# Search: SmolLM2-135M beside published methods of structured pruning",
        "",
        setting("`python benchmarks/search_llm.py run`, then `--write`", packages, "one thread"),
        "",
        f"Gone: of the parameters of the 30 blocks. {options.windows} calibration windows of {options.context} tokens, "
        "half film reviews, half sections of the Python manual, the same for all methods. Delta: negative "
        f"log-likelihood minus that of the dense model, in nats, on {TEST_WINDOWS} windows of {TEST_CONTEXT} tokens "
        "each of other film reviews and of Lee news, 95% interval over windows (paired). Distillation: "
        f"{STEPS} steps of one window of {STEP_TOKENS} tokens. The dense model is dequantised from 4 bits. FLAP, 2SSP "
        f"and ZipLM are re-derivations; 2SSP tries attention layers on {baselines.SECOND_STAGE_TOKENS} tokens. "
        "Seconds: CPU time of one thread.",
    ]
    for share in shares:
        lines += ["", f"## {100 * share:.0f}% gone", "", *table(share, seeds, options)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run rows, or write the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"run, or some of {', '.join(METHODS)}")
    parser.add_argument("--write", action="store_true", help="write the Markdown from what was run")
    parser.add_argument("--heal", action="store_true", help="distil each row too")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--shares", default="0.15,0.25,0.4")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shares, seeds = [float(s) for s in options.shares.split(",")], [int(s) for s in options.seeds.split(",")]
    names = [name for name in options.methods if name != "run"] or (list(METHODS) if options.methods else [])
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method {unknown[0]}; there is {', '.join(METHODS)}")
    KEPT.mkdir(parents=True, exist_ok=True)
    have = material() if names else None
    for seed in seeds:
        for share in shares:
            for name in names:
                assert have is not None
                row = run_row(have, name, share, seed, options)
                write_json(stored(name, share, seed, options), row)
                for stage in ("oneshot", "healed"):
                    if stage in row:
                        print(seed, share, stage, *cells(name, row, stage), sep=" | ", flush=True)
    if options.write:
        path = HERE / "results" / f"{datetime.date.today()}-search-llm.md"
        path.write_text(page(shares, seeds, options), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
