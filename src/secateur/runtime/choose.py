"""Chooses by measurement whether a layer runs sparse, and in which packing; remembers it for this machine.

A choice depends on the shape, the density (in steps), the number of tokens and threads, not on the values,
so layers
of equal shape share one measurement, and a small JSON file in the user's cache shares it between runs.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from secateur.runtime.native import isa
from secateur.runtime.ops import sparse_linear
from secateur.runtime.packed import pack

CACHE_VERSION = 1
WORTH = 0.95  # sparse must take less than this share of the dense time
SECONDS_A_CANDIDATE = 0.02


@dataclass(frozen=True)
class Choice:
    """How one layer runs: `format` 'dense' or a packing and its parameters, and the times it was chosen
    by."""

    format: str
    tile: int
    chunk: int
    dense_us: float
    sparse_us: float


def candidates(isa_name: str, tokens: int) -> list[tuple[int, int]]:
    """(tile, chunk) pairs worth measuring: a tile of activations of about the L1 cache's size."""
    if isa_name == "avx512":
        pairs = [(128, 64), (64, 128), (64, 192), (32, 256), (16, 384)]
    elif isa_name == "avx2":
        pairs = [(64, 96), (64, 128), (32, 192), (32, 384), (16, 384)]
    else:
        pairs = [(32, 128), (16, 256)]
    useful = max(16, 2 ** (max(tokens, 1) - 1).bit_length())
    kept = [(tile, chunk) for tile, chunk in pairs if tile <= useful]
    return kept or pairs[-1:]


def density_step(density: float) -> float:
    """Density rounded to a grid on which neighbours behave alike."""
    step = 0.01 if density < 0.1 else 0.05
    return round(round(density / step) * step, 2)


def choose(weight: np.ndarray, bias: torch.Tensor | None, tokens: int, use_cache: bool = True) -> Choice:
    """Measure dense against each packing for one weight (rows, cols), `tokens` tokens and torch's thread
    count."""
    density = np.count_nonzero(weight) / weight.size
    key = "/".join(
        str(part) for part in (*weight.shape, density_step(density), tokens, torch.get_num_threads(), bias is not None)
    )
    known = _load() if use_cache else {}
    if key in known:
        return Choice(**known[key])
    choice = _measure(weight, bias, tokens, density)
    if use_cache:
        known[key] = asdict(choice)
        _store(known)
    return choice


def _measure(weight: np.ndarray, bias: torch.Tensor | None, tokens: int, density: float) -> Choice:
    rows, cols = weight.shape
    x = torch.randn(tokens, cols)
    dense = torch.from_numpy(weight)
    runs: dict[tuple[int, int], Callable[[], object]] = {}
    with torch.inference_mode():
        # Even with every weight gone the kernels have fixed costs; a nearly full layer needs no measuring.
        if density < 0.8:
            for tile, chunk in candidates(isa(), tokens):
                packed = torch.from_numpy(pack(weight, tile=tile, chunk=chunk))
                runs[tile, chunk] = partial(sparse_linear, x, packed, bias, rows, 0)
        times = _interleaved([lambda: torch.nn.functional.linear(x, dense, bias), *runs.values()])
    dense_us, sparse = times[0], dict(zip(runs, times[1:], strict=True))
    if not sparse or min(sparse.values()) > WORTH * dense_us:
        return Choice("dense", 0, 0, dense_us, min(sparse.values(), default=dense_us))
    tile, chunk = min(sparse, key=lambda pair: sparse[pair])
    return Choice("tiled", tile, chunk, dense_us, sparse[tile, chunk])


def _interleaved(functions: list[Callable[[], object]]) -> list[float]:
    """The median time of each function in microseconds, taken in turns so that load hits all alike."""
    samples: list[list[float]] = [[] for _ in functions]
    for f in functions:
        f()
    end = time.perf_counter() + SECONDS_A_CANDIDATE * len(functions)
    while len(samples[0]) < 5 or (time.perf_counter() < end and len(samples[0]) < 51):
        for f, took in zip(functions, samples, strict=True):
            start = time.perf_counter()
            f()
            took.append((time.perf_counter() - start) * 1e6)
    return [float(np.median(took)) for took in samples]


@cache
def machine_key() -> str:
    """What a measurement depends on besides the layer: CPU model, instruction set, versions."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model} x{os.cpu_count()} {isa()} torch {torch.__version__}"


def cache_file() -> Path:
    """Where measurements are kept: SECATEUR_CACHE, else the user's cache folder."""
    folder = os.environ.get("SECATEUR_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "secateur")
    return Path(folder) / "runtime.json"


def _load() -> dict[str, dict]:
    try:
        data = json.loads(cache_file().read_text())
        if data.get("version") == CACHE_VERSION:
            return data["machines"].get(machine_key(), {})
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    return {}


def _store(known: dict[str, dict]) -> None:
    """Write the cache in one step; a folder that cannot be written costs a new measurement next time, no
    more."""
    path = cache_file()
    try:
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError):
            data = {}
        if not isinstance(data, dict) or data.get("version") != CACHE_VERSION:
            data = {"version": CACHE_VERSION, "machines": {}}
        data["machines"][machine_key()] = known
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps(data, indent=1, sort_keys=True))
        fresh.replace(path)
    except OSError:
        pass
