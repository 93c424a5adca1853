"""Chooses by measurement whether a layer runs sparse, and in which packing, and remembers the choice for this machine.

A choice depends on the shape, the density (in steps), the pattern of zeros, the value type and the number of tokens and
threads, not on the weights themselves. So layers of equal shape share one measurement, and a small JSON file in the
user's cache folder shares it between runs.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ModelError
from secateur.files.cache import cache_folder
from secateur.kernels.format import BLOCKS, VALUES_OF
from secateur.kernels.native import isa
from secateur.kernels.packing import pack, row_block_for, tiled_defaults
from secateur.kernels.zero_patterns import Zeros, zeros_of
from secateur.runtime.layers.operators import run, sparse_linear
from secateur.schemas.compiled import Measurements
from secateur.schemas.reading import check, read_json

CACHE_VERSION = 7
WORTH = 0.95  # sparse must take less than this share of the dense time
SECONDS_A_CANDIDATE = 0.02
FEWEST_ROUNDS, FEWEST_COLD_ROUNDS, MOST_ROUNDS = 5, 9, 51
"""How often each candidate is timed. A cold round spends its time on driving weights out, so few fit into a candidate's
seconds."""
FEW_TOKENS = 16
"""Up to so many tokens layers are timed with their weights out of the caches, as they are in a large model."""
MASK_TOKENS = 8
"""Up to so many tokens the bitmask format is worth a measurement."""
GROUP_TOKENS = 16
"""Up to so many tokens the nm format is worth a measurement."""
EVICT_BYTES = 64_000_000
"""Bytes that are read to drive weights out of the caches."""

Packing = dict[str, Any]
"""The keyword arguments of `pack`."""


@dataclass(frozen=True)
class FormatChoice:
    """How one layer runs, and the times that decided it.

    - `packing`: the arguments of `pack`; None for a layer that stays dense
    - `dense_us`, `sparse_us`: microseconds of the dense layer and of the fastest packing; 0 where nothing was timed
    - `possible`: whether any format stores this value type for this pattern of zeros
    """

    packing: Packing | None
    dense_us: float = 0.0
    sparse_us: float = 0.0
    possible: bool = field(default=True)


def candidates(isa_name: str, tokens: int) -> list[tuple[int, int]]:
    """(tile, chunk) pairs worth measuring: a tile of activations of about the L1 cache's size."""
    if isa_name == "avx512":
        pairs = [(64, 96), (64, 128), (48, 256), (32, 192), (32, 384), (16, 384)]
    elif isa_name == "avx2":
        pairs = [(48, 128), (32, 128), (32, 192), (32, 384), (16, 384)]
    else:
        pairs = [(32, 128), (16, 256)]
    return _useful(pairs, tokens) or pairs[-1:]


def quad_candidates(isa_name: str, tokens: int) -> list[tuple[int, int]]:
    """(tile, chunk) pairs worth measuring for the quad format."""
    pairs = [(128, 256), (64, 512), (32, 768)] if isa_name == "avx512" else [(16, 768), (32, 384), (64, 192)]
    return _useful(pairs, tokens) or [(16, 768)]


def _useful(pairs: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The (tile, chunk) pairs with a tile no wider than the tokens, rounded up to a power of two of at least 16."""
    widest = max(16, 2 ** (max(tokens, 1) - 1).bit_length())
    return [(tile, chunk) for tile, chunk in pairs if tile <= widest]


def density_step(density: float) -> float:
    """Density rounded to a grid; layers with the same rounded density share a measurement."""
    step = 0.01 if density < 0.1 else 0.05
    return round(round(density / step) * step, 2)


def packings(tokens: int, zeros: Zeros, value: str, activations: str) -> list[Packing]:
    """The arguments of `pack` worth measuring for a pattern of zeros, most promising first.

    Formats that round activations are among them only where `activations` is 'int8'.
    """
    promising: list[Packing] = []
    if zeros.quads and activations == "int8" and value in VALUES_OF["quad"]:
        promising += [{"format": "quad", "tile": t, "chunk": chunk} for t, chunk in quad_candidates(isa(), tokens)]
    promising += [{"format": "block", "block": size} for size in BLOCKS[::-1] if size <= zeros.block]
    if zeros.groups is not None and tokens <= GROUP_TOKENS:
        promising.append({"format": "nm", "keep": zeros.groups[0], "of": zeros.groups[1]})
    if value in VALUES_OF["tiled"]:
        promising += [{"format": "tiled", "tile": t, "chunk": chunk} for t, chunk in candidates(isa(), tokens)]
    if value in VALUES_OF["bitmask"] and tokens <= MASK_TOKENS:
        promising.append({"format": "bitmask"})
    return [packing | {"value": value} for packing in promising]


def full_packings(tokens: int, value: str) -> list[Packing]:
    """The arguments of `pack` worth measuring for a weight with few zeros, all of whose weights are stored.

    A smaller type pays at few tokens, where reading the weights takes the time; at many a dense product is better.
    """
    is_worth = tokens <= FEW_TOKENS and value != "float32"
    return [{"format": "block", "block": BLOCKS[-1], "value": value}] if is_worth else []


def unmeasured(
    weight: np.ndarray, *, tokens: int, value: str, activations: str = "float32", full: bool = False
) -> FormatChoice:
    """The packing that did best on the machines tried; the arguments are those of `choose`."""
    promising = full_packings(tokens, value) if full else packings(tokens, zeros_of(weight), value, activations)
    if not promising:
        return FormatChoice(None, possible=False)
    if promising[0]["format"] == "tiled":
        tile, chunk = tiled_defaults(isa(), np.count_nonzero(weight) / weight.size)
        packing = {"format": "tiled", "tile": tile, "chunk": chunk, "value": value}
        return FormatChoice(with_row_blocks(packing, weight.shape[0], tokens))
    return FormatChoice(promising[0])


def with_row_blocks(packing: Packing, rows: int, tokens: int, *, threads: int = 0) -> Packing:
    """A packing whose row blocks suit a number of threads (0: torch's), where the format lets them be chosen."""
    if packing["format"] != "tiled":
        return packing
    return packing | {"row_block": row_block_for(rows, packing["tile"], tokens, threads or torch.get_num_threads())}


def choose(
    weight: np.ndarray,
    bias: torch.Tensor | None,
    *,
    tokens: int,
    value: str = "float32",
    activations: str = "float32",
    full: bool = False,
    use_cache: bool = True,
) -> FormatChoice:
    """Measure the dense layer against each packing.

    Args:
        weight: (rows, cols), float32.
        bias: (rows,), or None.
        tokens: rows of the input in the calls that are timed, on torch's present number of threads.
        value: the type of the stored weights.
        activations: 'int8' allows formats that round activations.
        full: the weight has few zeros, and all its weights are stored.
        use_cache: take and keep the choice in `cache_file`.
    """
    density = np.count_nonzero(weight) / weight.size
    zeros = Zeros() if full else zeros_of(weight)
    promising = full_packings(tokens, value) if full else packings(tokens, zeros, value, activations)
    if not promising:
        return FormatChoice(None, possible=False)
    pattern = "full" if full else zeros
    parts = (*weight.shape, density_step(density), pattern, value, activations, tokens, torch.get_num_threads())
    key = "/".join(str(part) for part in (*parts, bias is not None))
    known = _load().get(machine_key(), {}) if use_cache else {}
    # Even with every weight gone the kernels have fixed costs; a nearly full layer needs no measuring.
    is_measured = full or density < 0.8
    tried = [with_row_blocks(packing, weight.shape[0], tokens) for packing in promising] if is_measured else []
    # A packing that is none of those that fit was not measured here.
    if key in known and known[key]["packing"] in (None, *tried):
        return FormatChoice(**known[key])
    choice = _measure(weight, bias, tokens, tried)
    if use_cache:
        known[key] = asdict(choice)
        _store(known)
    return choice


def _measure(weight: np.ndarray, bias: torch.Tensor | None, tokens: int, tried: list[Packing]) -> FormatChoice:
    """Time the dense layer and each packing; the fastest packing must beat the dense layer by `WORTH`."""
    rows, cols = weight.shape
    x = torch.randn(tokens, cols)
    dense = torch.from_numpy(weight)
    runs = [partial(run, sparse_linear, x, torch.from_numpy(pack(weight, **p)), bias, rows, 0) for p in tried]
    with torch.inference_mode():
        cold = np.zeros(EVICT_BYTES // 8) if tokens <= FEW_TOKENS and tried else None
        dense_us, *sparse = interleaved([lambda: torch.nn.functional.linear(x, dense, bias), *runs], cold)
    if not sparse or min(sparse) > WORTH * dense_us:
        return FormatChoice(None, dense_us, min(sparse, default=dense_us))
    return FormatChoice(tried[int(np.argmin(sparse))], dense_us, min(sparse))


def interleaved(functions: list[Callable[[], object]], cold: np.ndarray | None = None) -> list[float]:
    """The lower quartile of the times of each function, in microseconds.

    The functions run in turns, so that other load on the machine affects all alike, and each turn has an order of its
    own: a kernel takes up to twice as long right after a product of torch as after another kernel. The upper half of
    the times says more about that load than about the function. With `cold`, an array larger than the caches, each run
    starts with the weights out of the caches.
    """
    samples: list[list[float]] = [[] for _ in functions]
    for f in functions:
        f()
    random = np.random.default_rng(0)
    fewest = FEWEST_ROUNDS if cold is None else FEWEST_COLD_ROUNDS
    end = time.perf_counter() + SECONDS_A_CANDIDATE * len(functions)
    while len(samples[0]) < fewest or (time.perf_counter() < end and len(samples[0]) < MOST_ROUNDS):
        for i in random.permutation(len(functions)):
            if cold is not None:
                cold.max()
            start = time.perf_counter()
            functions[i]()
            samples[i].append((time.perf_counter() - start) * 1e6)
    return [float(np.percentile(took, 25)) for took in samples]


@cache
def machine_key() -> str:
    """The machine that a measurement belongs to: CPU model, number of CPUs, instruction set, version of torch."""
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
    """The file of measurements in the cache folder."""
    return cache_folder() / "runtime.json"


def _load(*, warn: bool = True) -> dict[str, dict[str, dict]]:
    """The measurements of every machine; none where the file is missing, of another version, or damaged."""
    path = cache_file()
    try:
        if not path.exists():
            return {}
        data = read_json(path, remedy="it is ignored, and layers are measured again")
        if data.get("version") != CACHE_VERSION:
            return {}
        return check(data, Measurements, str(path), remedy="it is ignored, and layers are measured again").as_data()
    except (OSError, ModelError) as error:
        if warn:
            warnings.warn(str(error), RuntimeWarning, stacklevel=3)
        return {}


def _store(known: dict[str, dict]) -> None:
    """Write the measurements of this machine in one step. A folder that cannot be written only costs a new measurement
    in the next run."""
    path = cache_file()
    data = {"version": CACHE_VERSION, "machines": {**_load(warn=False), machine_key(): known}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(json.dumps(data, indent=1, sort_keys=True))
        fresh.replace(path)
    except OSError:
        pass
