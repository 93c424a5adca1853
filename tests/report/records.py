"""Records for tests of reports: a rich one, and variations of it for comparisons."""

import base64
import math
import struct
import zlib

from secateur.schemas.record import (
    Asked,
    Curve,
    DataFile,
    Example,
    FrontierPoint,
    Matrix,
    Parity,
    Provenance,
    Quality,
    Record,
    Sizes,
    Speed,
    Stage,
    Units,
)
from secateur.schemas.results import Machine

BLOCKS = 12


def thumbnail(side=24):
    """A square PNG as a data URI: red that turns brown from left to right."""
    row = b"\0" + b"".join(bytes((220 - 4 * x, 30 + 3 * x, 30)) for x in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(row * side)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def rich(title="reviews-2x", **changes):
    """A record with every part. changes: fields that replace those of the example."""
    record = Record(
        title=title,
        task="text-classification",
        model_type="bert",
        reading="1.96 times as fast on onnx, with a drop of 0.0013 accuracy, 95% [-0.0098, 0.0105].",
        asked=[
            Asked(what="speed on onnx, 1 x 128 tokens", asked="2x", reached="1.96x", is_met=True),
            Asked(what="drop of accuracy", asked="at most 0.01", reached="0.0013", is_met=True),
            Asked(what="bytes on disk", asked="at most 30 MB", reached="51 MB", is_met=False),
            Asked(what="healing", asked="30 min", reached="8 min"),
        ],
        quality=Quality(
            metric="accuracy", dense=0.8613, pruned=0.86, drop=0.0013, interval=[-0.0098, 0.0105], rows=2000,
            divergence=0.0312, flips=0.031,
        ),
        stages=[
            Stage(name="dense", value=0.8613, divergence=0.0),
            Stage(name="pruned", value=0.8242, divergence=0.141),
            Stage(name="healed", value=0.86, divergence=0.0312),
        ],
        sizes=Sizes(
            parameters=13_100_000, dense_parameters=22_700_000, nonzero=13_000_000, bytes=52_400_000,
            dense_bytes=90_900_000, macs_share=0.44,
        ),
        speeds=speeds(24.67),
        frontier=frontier(),
        units=units(),
        matrices=matrices(),
        curves=curves(),
        parities=[
            Parity(runtime="onnx", difference=3.1e-6, bound=1e-4, inputs=200),
            Parity(runtime="openvino", difference=6.4e-5, bound=1e-4, inputs=200),
            Parity(runtime="litert", difference=2.3e-4, bound=1e-4, inputs=200),
        ],
        examples=[
            Example(kind="text", shown="A film that is kind to its people, if not to us.", expected="positive",
                    dense="positive", pruned="negative", divergence=0.41),
            Example(kind="image", shown=thumbnail(), expected="red", dense="red", pruned="brown", divergence=0.12),
            Example(kind="text", shown="Ninety minutes of rain, and then the credits.\nI stayed for the credits.",
                    dense="negative", pruned="positive", divergence=1.36),
        ],
        notes=["OpenVINO gains less than ONNX Runtime, because its dense attention is faster to begin with."],
        provenance=Provenance(
            command="secateur prune ./classifier --data reviews.csv --speed-up 2 --on onnx --output small",
            date="2026-11-30T12:00:00+00:00", seconds=497.0, seed=0,
            versions={"secateur": "0.1", "torch": "2.11.0", "transformers": "5.23.0", "onnxruntime": "1.27.0"},
            machine=Machine(processor="AMD EPYC 9R14", cores=2, system="Linux 6.1", python="3.11.15"),
            data=[
                DataFile(role="training", name="reviews.csv", rows=8000, sha256="3f" * 32),
                DataFile(role="test", name="test.csv", rows=2000, sha256="a7" * 32),
            ],
        ),
    )  # fmt: skip
    return record.model_copy(update=changes)


def several():
    """Three records of the same dense model, of which the last has no record of speed on openvino."""
    smaller = Quality(metric="accuracy", dense=0.8613, pruned=0.8421, drop=0.0192, interval=[0.0081, 0.0304], rows=2000)
    return [
        rich("reviews-2x"),
        rich(
            "reviews-3x", quality=smaller, speeds=speeds(16.2), frontier=[], stages=[], curves=[],
            sizes=Sizes(parameters=9_400_000, dense_parameters=22_700_000, bytes=37_600_000, dense_bytes=90_900_000),
        ),
        rich(
            "reviews-1.5x", quality=None, speeds=speeds(32.5)[:1], frontier=[], sizes=None, examples=[], notes=[],
            asked=[], provenance=None,
        ),
    ]  # fmt: skip


def speeds(ms):
    """Times on two runtimes; those of onnx are the given ones."""
    return [
        Speed(runtime="onnx", batch=1, length=128, threads=1, ms=ms, low_ms=ms * 0.98, high_ms=ms * 1.04,
              dense_ms=48.25, dense_low_ms=47.6, dense_high_ms=50.1, peak_bytes=210_000_000),
        Speed(runtime="openvino", batch=1, length=128, threads=1, ms=ms * 1.08, low_ms=ms, high_ms=ms * 1.3,
              dense_ms=43.4, dense_low_ms=42.9, dense_high_ms=45.7),
    ]  # fmt: skip


def frontier():
    """The dense model, a chain of uniform ones and a chain of chosen ones, one of which is the result."""
    points = [FrontierPoint(name="dense", group="dense", latency_share=1.0, parameters_share=1.0, value=0.8613)]
    for share, chosen, uniform, before in (
        (0.78, 0.8632, 0.8501, 0.8544), (0.64, 0.8611, 0.8343, 0.8402), (0.51, 0.86, 0.8031, 0.8242),
        (0.4, 0.8487, 0.7422, 0.7816), (0.33, 0.8290, 0.6911, 0.7203),
    ):  # fmt: skip
        points += [
            FrontierPoint(name=f"chosen at {share:.2f}", group="chosen", latency_share=share, value=chosen,
                          before=before, is_result=share == 0.51),
            FrontierPoint(name=f"uniform at {share:.2f}", group="uniform", latency_share=share + 0.01, value=uniform),
        ]  # fmt: skip
    return points


def units():
    """Heads and neurons of twelve blocks; the last block has no heads left."""
    found = [Units(axis="hidden", kind="hidden", kept=384, total=384)]
    for block in range(BLOCKS):
        heads = 12 - block if block < BLOCKS - 1 else 0
        found += [
            Units(axis=f"L{block}.head", kind="head", block=block, kept=heads, total=12),
            Units(axis=f"L{block}.ffn", kind="ffn", block=block, kept=1536 - 96 * block, total=1536),
        ]
    return found


def matrices():
    """The six weights of each block, some with zeros."""
    found = []
    for block in range(BLOCKS):
        name = f"bert.encoder.layer.{block}."
        width = 32 * (12 - block)
        for part in ("query", "key", "value"):
            found.append(Matrix(name=f"{name}attention.self.{part}.weight", block=block, shape=[width, 384],
                                dense_shape=[384, 384], density=0.5 + block / 30))  # fmt: skip
        found += [
            Matrix(name=f"{name}attention.output.dense.weight", block=block, shape=[384, width],
                   dense_shape=[384, 384], density=1.0),
            Matrix(name=f"{name}intermediate.dense.weight", block=block, shape=[1536 - 96 * block, 384],
                   dense_shape=[1536, 384], density=0.7),
            Matrix(name=f"{name}output.dense.weight", block=block, shape=[384, 1536 - 96 * block],
                   dense_shape=[384, 1536], density=0.25),
        ]  # fmt: skip
    return found


def curves():
    """Two lines of healing in one chart, and a long schedule."""
    steps = range(0, 800, 40)
    return [
        Curve(name="training", x="step of healing", y="loss",
              points=[[step, 0.6 * math.exp(-step / 200) + 0.1] for step in steps]),
        Curve(name="search rows", x="step of healing", y="loss",
              points=[[step, 0.6 * math.exp(-step / 260) + 0.16] for step in steps]),
        Curve(name="schedule of sparsity", x="step", y="share of weights that are zero",
              points=[[step, 0.5 * (1 - (1 - step / 1000) ** 3)] for step in range(1001)]),
    ]  # fmt: skip
