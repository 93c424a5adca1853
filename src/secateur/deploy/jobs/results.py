"""What `export` and `bench` return, as plain values; no framework is needed here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur import notebook
from secateur.deploy import runner

TOLERANCE = 1e-4
"""Largest permitted relative error in float32 (`secateur.agreement`). Runtimes sum in other orders, fuse, and
approximate exp, erf and tanh in other ways than the framework, which leaves more than the 6e-8 of one rounding."""
BATCHES = (1, 3, 8)
"""Batch sizes of a comparison, where a target takes any."""
WORTH_A_WORD = 0.1
"""Share of zeros from which `bench` says that they bring nothing on a runtime."""


@dataclass(frozen=True)
class Parity:
    """The result of a comparison, over all data.

    relative_error: the largest of any output, as `secateur.agreement` measures it.
    worst_logit: largest absolute difference of any output.
    agreement: share of equal argmax of the logits (rows of a classifier, tokens of a decoder); None without logits.
    examples, shapes: what was compared. made_up: whether the inputs were random.
    """

    relative_error: float
    worst_logit: float
    agreement: float | None
    examples: int
    shapes: list[str]
    tolerance: float
    made_up: bool = False


@dataclass(frozen=True)
class Artefact:
    """What `export` wrote. zeros: the share of zeros in matrices."""

    folder: Path
    target: str
    bytes: int
    parameters: int
    zeros: float
    parity: Parity | None
    generation: dict[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Timing:
    """One model on one runtime at one shape.

    length: in tokens; 0 for a model that takes none.
    median_ms, low_ms, high_ms: median and quartiles.
    ratio: the median over that of the first model.
    sparse: whether it runs on secateur's kernels there.
    error: a sentence that says why there is no time, or ''.
    """

    model: str
    runtime: str
    batch: int
    length: int
    median_ms: float = float("nan")
    low_ms: float = float("nan")
    high_ms: float = float("nan")
    ratio: float = float("nan")
    startup_s: float = float("nan")
    peak_bytes: int = 0
    bytes: int = 0
    zeros: float = 0.0
    sparse: bool = False
    error: str = ""


@dataclass(frozen=True)
class Bench:
    """The result of `bench`. warnings: sentences for the user. machine: as `runner.machine` returns it."""

    timings: list[Timing]
    warnings: list[str]
    threads: int
    machine: dict[str, Any]

    def _repr_html_(self) -> str:
        rows = [
            (
                *(t.model, t.runtime, in_words(t.batch, t.length), t.error),
                *map(notebook.number, (t.median_ms, t.low_ms, t.high_ms, t.ratio)),
                f"{t.bytes / 1e6:.1f}",
            )
            for t in self.timings
        ]
        columns = ("model", "runtime", "batch x tokens", "error", "ms", "quartile 1", "quartile 3", "ratio", "MB")
        title = f"{self.threads} threads, {self.machine.get('processor') or 'unknown processor'}"
        return notebook.table(title, columns, rows, left=4, notes=self.warnings)

    def as_json(self) -> dict[str, Any]:
        """Plain values; null for values that were not measured, and for the length of what takes no tokens."""
        rows = [{k: None if isinstance(v, float) and v != v else v for k, v in asdict(t).items()} for t in self.timings]
        rows = [{**row, "length": row["length"] or None} for row in rows]
        return {"threads": self.threads, "machine": self.machine, "warnings": self.warnings, "rows": rows}


def in_words(batch: int, length: int) -> str:
    """The shape of a call: `8 x 64`, or `8` for a model that takes no tokens."""
    return f"{batch} x {length}" if length else str(batch)


class BenchInterrupted(KeyboardInterrupt):
    """Ctrl-C during `bench`. result: the rows that were complete."""

    def __init__(self, result: Bench) -> None:
        super().__init__(f"{len(result.timings)} rows were complete")
        self.result = result


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names for a table: the last part of each path (without `.keras`), or the whole path where two are equal."""
    short = [path.stem if path.suffix == ".keras" else path.resolve().name for path in paths]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]


def timed(
    rows: Mapping[str, Mapping[str, Any]], artefacts: Mapping[str, Path], runtime: str, shape: tuple[int, int]
) -> list[Timing]:
    """Rows of `runner.measure` with sizes and ratios."""
    first = next((row["median_ms"] for row in rows.values() if "median_ms" in row), float("nan"))
    timings = []
    for name, row in rows.items():
        info = runner.read(artefacts[name])
        ratio = row["median_ms"] / first if "median_ms" in row else float("nan")
        sizes: dict[str, Any] = {"bytes": info.get("bytes", 0), "zeros": info.get("zeros", 0.0), "ratio": ratio}
        sizes["sparse"] = runtime == "secateur" or "sparse" in info
        timings.append(Timing(name, runtime, shape[0], shape[1], **row, **sizes))
    return timings


def words(timings: Sequence[Timing], instead: str = ", or use the runtime secateur, which skips zeros") -> list[str]:
    """A sentence for each model and runtime on which its zeros bring nothing."""
    sentences: dict[tuple[str, str], str] = {}
    for t in timings:
        if t.error or t.zeros < WORTH_A_WORD or t.sparse or t.runtime == "secateur":
            continue
        if (t.model, t.runtime) in sentences:
            continue
        took = f"; it takes {t.ratio:.2f} of the first model's time" if t.ratio == t.ratio and t.ratio != 1.0 else ""
        sentences[t.model, t.runtime] = (
            f"zeros bring nothing on {t.runtime}: {t.model} has {100 * t.zeros:.0f}% zeros, multiplied like any other "
            f"weight{took}. Remove heads and neurons{instead}"
        )
    return list(sentences.values())
