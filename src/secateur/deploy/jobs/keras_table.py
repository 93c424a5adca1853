"""bench: Keras models in memory as files for runtimes, compared with Keras and timed in turn in this process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree

from secateur.cost import side_by_side
from secateur.deploy import runner
from secateur.errors import ModelError
from secateur.keras.batches import floats, run
from secateur.keras.export import SUFFIX, export, quiet

Call = Callable[[Any], list[np.ndarray]]


@dataclass(frozen=True)
class Row:
    """One model on one runtime.

    difference: largest absolute difference from the model in Keras.
    bytes: size of the file, or of the folder.
    """

    target: str
    model: str
    difference: float
    bytes: int
    latency_ms: float


def load(path: Path | str, target: str, threads: int = 1) -> Call:
    """A written model on its runtime: inputs -> floating outputs."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"no {target} model at {path}")
    with quiet():
        program = runner.OPENERS[path.suffix](path, threads)
    return lambda x: [a for a in program.call(tree.flatten(x)) if np.issubdtype(a.dtype, np.floating)]


def bench(
    models: Mapping[str, keras.Model],
    example: Any,
    targets: Sequence[str],
    folder: Path | str,
    *,
    sparse: Sequence[str] = (),
    repeats: int = 30,
) -> list[Row]:
    """Export models for runtimes, compare each with its model in Keras, and time them in turn on one thread.

    sparse: models that are written in LiteRT's sparse format too (as `tflite sparse`).
    """
    rows: list[Row] = []
    for target in targets:
        calls: dict[str, Call] = {}
        sizes: dict[str, int] = {}
        for name, model in models.items():
            for label in (name, *([f"{name}, sparse format"] if target == "tflite" and name in sparse else [])):
                path = Path(folder) / f"{label.replace(', ', '-').replace(' ', '-')}-{target}{SUFFIX[target]}"
                export(model, path, target, example, sparse=label != name, overwrite=True)
                calls[label], sizes[label] = load(path, target), _bytes(path)
        worst = {}
        for label, call in calls.items():
            expected = floats(run(models[label.removesuffix(", sparse format")], example))
            worst[label] = max(float(np.abs(a - b).max()) for a, b in zip(expected, call(example), strict=True))
        seconds = side_by_side({label: _bound(call, example) for label, call in calls.items()}, repeats)
        rows += [Row(target, label, worst[label], sizes[label], 1e3 * seconds[label]) for label in calls]
    return rows


def _bound(call: Call, example: Any) -> Callable[[], object]:
    return lambda: call(example)


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in (path, path.with_suffix(".bin")) if file.is_file())
