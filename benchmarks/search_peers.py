"""Automatic structured pruning of a MiniLM classifier beside two peers: equal multiply-accumulates, no training.

    python benchmarks/search_peers.py run [CASE ...] --kwon-python ENV/bin/python --kwon-checkout FOLDER \
        --torch-pruning-python ENV/bin/python [--shares 0.5,0.33] [--seeds 0,1,2]
    python benchmarks/search_peers.py --write

The first line keeps the answers of each case, share and seed under .cache/search/peers; the second writes the dated
Markdown from all of them. The environments of the peers are described at the head of search_peer_kwon.py and
search_peer_torch_pruning.py; model and rows are those of search_models.py. Every case gets the same dense model and is
scored here, on logits of the same test rows. Seconds are CPU time of one thread, without loading and testing.
"""

import argparse
import csv
import datetime
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import search_models
import search_ours
import torch
import transformers
from scipy.optimize import minimize_scalar
from setting import setting

from secateur.data.read import read_table
from secateur.jobs.demo import LENGTH
from secateur.jobs.open_task import look, open_host
from secateur.metrics.drop import Drop, drop
from secateur.metrics.metric import ACCURACY
from secateur.scores import log_softmax
from secateur.search.target import Limit
from secateur.tasks.base.task import Options

HERE = Path(__file__).parent
KEPT = search_models.CACHE / "peers"
WIDTH, HEAD, LAYERS, HEADS, NEURONS = 384, 32, 6, 12, 1536
"""MiniLM: hidden width, width of a head, layers, heads and FFN neurons of a layer."""


@dataclass(frozen=True)
class Texts:
    """Rows of one split: token ids, and labels where there are any."""

    ids: list[list[int]]
    labels: np.ndarray | None

    def arrays(self, prefix: str = "") -> dict[str, np.ndarray]:
        """As a peer reads them."""
        lengths = np.array([len(row) for row in self.ids])
        found = {f"{prefix}ids": np.concatenate([np.array(row) for row in self.ids]), f"{prefix}lengths": lengths}
        return found if self.labels is None else {**found, f"{prefix}labels": self.labels}

    @property
    def length(self) -> float:
        """Tokens of a row, on average."""
        return float(np.mean([len(row) for row in self.ids]))


@dataclass(frozen=True)
class Job:
    """What a case is asked for: encoder multiply-accumulates to keep, relative to the dense model, and a seed."""

    share: float
    seed: int
    folder: Path
    options: argparse.Namespace

    @property
    def dense(self) -> Path:
        """The folder of the dense model."""
        return (self.folder / "dense").resolve()

    def texts(self, name: str) -> Texts:
        """Rows of train, test or unlabelled-SEED."""
        rows = list(csv.DictReader((self.folder / f"{name}.csv").open(encoding="utf-8")))
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.dense)
        ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
        labelled = "label" in rows[0]
        return Texts(ids, np.array([int(row["label"]) for row in rows]) if labelled else None)


def in_environment(python: str, script: str, before: Sequence[str], job: Job, rows: Texts, **more: object) -> Path:
    """Let a peer's script do a job in its environment; returns the file that it wrote."""
    given, output = KEPT / f"job-{os.getpid()}.npz", KEPT / f"answers-{os.getpid()}.npz"
    test = job.texts("test")
    known = {"model": str(job.dense), "share": job.share, "seed": job.seed, "length": test.length}
    np.savez(given, **rows.arrays(), **test.arrays("test_"), **known, output=str(output), **more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([python, str(HERE / script), *before, str(given)], check=True, env=environment)
    given.unlink()
    return output


def kwon(job: Job) -> Path:
    """Kwon et al., the authors' code: 2,048 labelled training rows, drawn with the seed."""
    before = [str(job.options.kwon_checkout)]
    return in_environment(job.options.kwon_python, "search_peer_kwon.py", before, job, job.texts("train"))


def torch_pruning(job: Job, scope: str) -> Path:
    """Torch-Pruning: as many labelled training rows as ours has unlabelled ones, drawn with the seed."""
    train = job.texts("train")
    assert train.labels is not None
    chosen = random.Random(job.seed).sample(range(len(train.ids)), search_models.CALIBRATION_ROWS)
    rows = Texts([train.ids[i] for i in chosen], train.labels[chosen])
    script = "search_peer_torch_pruning.py"
    return in_environment(job.options.torch_pruning_python, script, [], job, rows, scope=scope)


@torch.no_grad()
def logits_of(model: Any, texts: Texts) -> np.ndarray:
    """Logits (rows, classes), a row at a time."""
    return np.stack([model(input_ids=torch.tensor([row])).logits[0].numpy() for row in texts.ids])


def ours(job: Job) -> Path:
    """The search of secateur, on rows without labels, drawn with the seed."""
    host, task = open_host(look(str(job.dense), None), Options(max_length=LENGTH))
    examples = task.encode(read_table(job.folder / f"unlabelled-{job.seed}.csv"))
    limit = Limit("macs", job.share)
    found = search_ours.searched(host, task, examples, limit, batch_size=32, seed=job.seed, say=print)
    print(found.chosen, flush=True)
    output = KEPT / f"answers-{os.getpid()}.npz"
    kept = {name: search_ours.sizes(host, found.plan, kind) for name, kind in (("heads", "head"), ("neurons", "ffn"))}
    np.savez(output, logits=logits_of(found.host.model, job.texts("test")), seconds=found.seconds, **kept)
    return output


@dataclass(frozen=True)
class Case:
    """A row of the table. title: as it is printed. run: writes logits, seconds, heads and neurons as an .npz."""

    title: str
    run: Callable[[Job], Path]


CASES = {
    "ours": Case("secateur's search; 1,000 rows without labels", ours),
    "kwon": Case("Kwon et al. 2022, the authors' code; 2,048 labelled rows", kwon),
    "tp-uniform": Case(
        "Torch-Pruning 1.6.1, Taylor, the same share in each layer; 1,000 labelled rows",
        lambda job: torch_pruning(job, "uniform"),
    ),
    "tp-global": Case(
        "Torch-Pruning 1.6.1, Taylor, ranked over all layers; 1,000 labelled rows",
        lambda job: torch_pruning(job, "global"),
    ),
}


# -- scores -----------------------------------------------------------------------------------------------------------


def macs_share(heads: np.ndarray, neurons: np.ndarray, length: float) -> float:
    """Multiply-accumulates of the blocks, relative to the dense model's, for rows of so many tokens."""
    head, neuron = 4 * WIDTH * HEAD + 2 * length * HEAD, 2 * WIDTH
    return float((heads.sum() * head + neurons.sum() * neuron) / LAYERS / (HEADS * head + NEURONS * neuron))


def kept_of(mask: np.ndarray) -> np.ndarray:
    """Units of each layer, from masks (layers, units) or numbers (layers,)."""
    return (mask != 0).sum(1) if mask.ndim == 2 else mask


def divergence(dense: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence from the dense model's answers to others, both logits (rows, classes)."""
    p, q = log_softmax(dense), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def calibrated(dense: np.ndarray, other: np.ndarray) -> float:
    """The same after the scalar temperature that makes it smallest."""
    found = minimize_scalar(lambda t: divergence(dense, other * np.exp(t)), bounds=(-3, 3), method="bounded")
    return float(found.fun)


def accuracy_drop(dense: np.ndarray, answers: Sequence[np.ndarray], labels: np.ndarray) -> Drop:
    """Accuracy against the dense model's; a row of several seeds counts with its mean."""
    before = ACCURACY.rows(dense.argmax(1), labels)
    after = np.mean([ACCURACY.rows(logits.argmax(1), labels) for logits in answers], 0)
    return drop(ACCURACY, before, after)


def dense_logits(job: Job) -> np.ndarray:
    """Answers of the dense model on the test rows."""
    path = KEPT / f"{job.dense.name}.npy"
    if not path.exists():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(job.dense).eval()
        np.save(path, logits_of(model, job.texts("test")))
    return np.load(path)


def stored(case: str, share: float, seed: int) -> Path:
    """Where the answers of a case lie."""
    return KEPT / f"{case}-{share:g}-{seed}.npz"


def line(case: str, share: float, job: Job, seeds: Sequence[int], logits: str = "logits") -> dict[str, object] | None:
    """What a case reached at a share, over the seeds that were run."""
    found = [dict(np.load(path)) for seed in seeds if (path := stored(case, share, seed)).exists()]
    test, dense = job.texts("test"), dense_logits(job)
    if not found or logits not in found[0]:
        return None
    assert test.labels is not None
    answers = [each[logits] for each in found]
    sizes = [[kept_of(each[name]) for name in ("heads", "neurons")] for each in found]
    return {
        "share": np.mean([macs_share(*size, test.length) for size in sizes]),
        "drop": accuracy_drop(dense, answers, test.labels),
        "kl": [divergence(dense, each) for each in answers],
        "calibrated": [calibrated(dense, each) for each in answers],
        "flips": np.mean([(each.argmax(1) != dense.argmax(1)).mean() for each in answers]),
        "seconds": np.mean([each["seconds"] for each in found]),
        "seeds": len(found),
        "sizes": sizes[0],
    }


# -- the page ---------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """The mean, and the smallest and largest where there are several."""
    ends = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{ends}"


def cells(title: str, found: Mapping[str, object]) -> str:
    """A line of the table."""
    lost = found["drop"]
    assert isinstance(lost, Drop)
    assert lost.interval is not None
    low, high = lost.interval
    parts = [
        title,
        f"{100 * found['share']:.1f}%",
        f"{lost.pruned:.4f}",
        f"{lost.drop:+.4f} [{low:+.4f}, {high:+.4f}]",
        spread(found["kl"]),
        spread(found["calibrated"]),
        f"{100 * found['flips']:.1f}%",
        f"{found['seconds']:.0f}",
        str(found["seeds"]),
    ]
    return f"| {' | '.join(parts)} |"


def page(job: Job, shares: Sequence[float], seeds: Sequence[int]) -> str:
    """The Markdown."""
    test, dense = job.texts("test"), dense_logits(job)
    assert test.labels is not None
    packages = ("torch", "transformers", "secateur")
    line_of_setting = setting("`python benchmarks/search_peers.py run`, then `--write`", packages, "one thread")
    lines = [
        "# Search: a MiniLM classifier beside peers, at equal multiply-accumulates, without training",
        "",
        f"{line_of_setting} transformers 4.25.1 for Kwon et al.",
        "",
        f"all-MiniLM-L6-v2 trained on 4,000 Rotten Tomatoes reviews; accuracy of the dense model on {len(dense):,} "
        f"others {np.mean(dense.argmax(1) == test.labels):.4f}. Kept: multiply-accumulates of the blocks at "
        f"{test.length:.1f} tokens, the mean of the test rows. Drop: of the accuracy, paired bootstrap over rows, a "
        "row counts with its mean over seeds (of the calibration draw). KL: from the dense model's answers, mean over "
        "seeds, smallest and largest; then after the scalar temperature that is best on the test rows. Flips: rows "
        "answered in another way. Seconds: CPU time of one thread.",
    ]
    for share in shares:
        columns = ("method", "kept", "accuracy", "drop (95%)", "KL", "KL, scaled", "flips", "seconds", "seeds")
        rows = [(case.title, line(name, share, job, seeds)) for name, case in CASES.items()]
        rows.insert(2, ("the same before its scales", line("kwon", share, job, seeds, "logits_unscaled")))
        lines += ["", f"## {100 * share:.0f}% kept", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [cells(title, found) for title, found in rows if found is not None]
        lines += ["", "Heads and neurons of each layer, first seed:", ""]
        for title, found in rows:
            if found is not None:
                heads, neurons = found["sizes"]
                lines.append(f"- {title}: {heads.tolist()}, {neurons.tolist()}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run cases, or write the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"run, or some of {', '.join(CASES)}")
    parser.add_argument("--write", action="store_true", help="write the Markdown from what was run")
    parser.add_argument("--print", action="store_true", help="print it only")
    parser.add_argument("--kwon-python", default=sys.executable)
    parser.add_argument("--kwon-checkout", type=Path, default=Path("retraining-free-pruning"))
    parser.add_argument("--torch-pruning-python", default=sys.executable)
    parser.add_argument("--shares", default="0.5,0.33")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shares, seeds = [float(s) for s in options.shares.split(",")], [int(s) for s in options.seeds.split(",")]
    KEPT.mkdir(parents=True, exist_ok=True)
    folder = search_models.minilm()
    names = [name for name in options.cases if name != "run"] or (list(CASES) if options.cases else [])
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case {unknown[0]}; there is {', '.join(CASES)}")
    for seed in seeds:
        for share in shares:
            for name in names:
                job = Job(share, seed, folder, options)
                CASES[name].run(job).replace(stored(name, share, seed))
                found = line(name, share, job, [seed])
                assert found is not None
                print(seed, share, cells(name, found), flush=True)
    text = page(Job(shares[0], seeds[0], folder, options), shares, seeds) if options.write or options.print else ""
    if options.print:
        print(text)
    if options.write:
        path = HERE / "results" / f"{datetime.date.today()}-search-peers.md"
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
