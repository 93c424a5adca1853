"""Chooses by measurement whether a layer runs sparse, and in which packing; remembers it for this machine.

A choice depends on the shape, the density (in steps), the pattern, the value type and the number of tokens and
threads, not on the values, so layers of equal shape share one measurement, and a small JSON file in the user's cache
shares it between runs.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.kernels.native import isa
from secateur.kernels.packing import BLOCKS, VALUES_OF, pack, row_block_for, tiled_defaults
from secateur.kernels.zero_patterns import Zeros, zeros_of
from secateur.runtime.layers.operators import run, sparse_linear

CACHE_VERSION = 6
WORTH = 0.95  # sparse must take less than this share of the dense time
SECONDS_A_CANDIDATE = 0.02
FEW_TOKENS = 16
"""Up to here weights come from memory, not from a cache, in a model of any size, and are measured so."""
MASK_TOKENS = 8
"""Up to here the bitmask format is worth a measurement."""
GROUP_TOKENS = 16
"""The same for the nm format."""
EVICT_BYTES = 64_000_000


@dataclass(frozen=True)
class FormatChoice:
    """How one layer runs: dense where `packing` is None, else the arguments of `pack`; and the times it was chosen by.

    `possible` tells whether any format stores this value type for this pattern.
    """

    packing: dict[str, Any] | None
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
    useful = max(16, 2 ** (max(tokens, 1) - 1).bit_length())
    kept = [(tile, chunk) for tile, chunk in pairs if tile <= useful]
    return kept or pairs[-1:]


def quad_candidates(isa_name: str, tokens: int) -> list[tuple[int, int]]:
    """The same for the quad format."""
    pairs = [(128, 256), (64, 512), (32, 768)] if isa_name == "avx512" else [(16, 768), (32, 384), (64, 192)]
    useful = max(16, 2 ** (max(tokens, 1) - 1).bit_length())
    return [(tile, chunk) for tile, chunk in pairs if tile <= useful] or [(16, 768)]


def density_step(density: float) -> float:
    """Density rounded to a grid on which neighbours behave alike."""
    step = 0.01 if density < 0.1 else 0.05
    return round(round(density / step) * step, 2)


def packings(tokens: int, zeros: Zeros, value: str, activations: str) -> list[dict[str, Any]]:
    """The arguments of `pack` worth measuring for a pattern of zeros, most promising first.

    Formats that round activations are among them only where `activations` is 'int8'.
    """
    found: list[dict[str, Any]] = []
    if zeros.quads and activations == "int8" and value in VALUES_OF["quad"]:
        found += [{"format": "quad", "tile": t, "chunk": c, "value": value} for t, c in quad_candidates(isa(), tokens)]
    found += [{"format": "block", "block": size, "value": value} for size in BLOCKS[::-1] if size <= zeros.block]
    if zeros.groups is not None and tokens <= GROUP_TOKENS:
        keep, of = zeros.groups
        found.append({"format": "nm", "keep": keep, "of": of, "value": value})
    if value in VALUES_OF["tiled"]:
        found += [{"format": "tiled", "tile": t, "chunk": c, "value": value} for t, c in candidates(isa(), tokens)]
    if value in VALUES_OF["bitmask"] and tokens <= MASK_TOKENS:
        found.append({"format": "bitmask", "value": value})
    return found


def full_packings(tokens: int, value: str) -> list[dict[str, Any]]:
    """The same for a weight with few zeros: at few tokens it is worth its bytes alone, at many a dense product is."""
    few = tokens <= FEW_TOKENS and value != "float32"
    return [{"format": "block", "block": BLOCKS[-1], "value": value}] if few else []


def unmeasured(
    weight: np.ndarray, tokens: int, value: str, activations: str = "float32", full: bool = False
) -> FormatChoice:
    """The packing that did best on the machines tried."""
    found = full_packings(tokens, value) if full else packings(tokens, zeros_of(weight), value, activations)
    if not found:
        return FormatChoice(None, possible=False)
    if found[0]["format"] == "tiled":
        tile, chunk = tiled_defaults(isa(), np.count_nonzero(weight) / weight.size)
        packing = {"format": "tiled", "tile": tile, "chunk": chunk, "value": value}
        return FormatChoice(shared_out(packing, weight.shape[0], tokens))
    return FormatChoice(found[0])


def shared_out(packing: dict[str, Any], rows: int, tokens: int, threads: int = 0) -> dict[str, Any]:
    """The packing with row blocks for a number of threads (0: torch's), where its format leaves them to be chosen."""
    if packing["format"] != "tiled":
        return packing
    return packing | {"row_block": row_block_for(rows, packing["tile"], tokens, threads or torch.get_num_threads())}


def choose(
    weight: np.ndarray,
    bias: torch.Tensor | None,
    tokens: int,
    value: str = "float32",
    use_cache: bool = True,
    activations: str = "float32",
    full: bool = False,
) -> FormatChoice:
    """Measure dense against each packing for one weight (rows, cols), `tokens` tokens and torch's thread count; `full`:
    for one with few zeros, of which all weights are stored."""
    density = np.count_nonzero(weight) / weight.size
    zeros = Zeros() if full else zeros_of(weight)
    tried = full_packings(tokens, value) if full else packings(tokens, zeros, value, activations)
    found = [shared_out(packing, weight.shape[0], tokens) for packing in tried]
    if not found:
        return FormatChoice(None, possible=False)
    pattern = "full" if full else zeros
    parts = (*weight.shape, density_step(density), pattern, value, activations, tokens, torch.get_num_threads())
    key = "/".join(str(part) for part in (*parts, bias is not None))
    known = _load() if use_cache else {}
    if key in known:
        return FormatChoice(**known[key])
    # Even with every weight gone the kernels have fixed costs; a nearly full layer needs no measuring.
    choice = _measure(weight, bias, tokens, found if full or density < 0.8 else [])
    if use_cache:
        known[key] = asdict(choice)
        _store(known)
    return choice


def _measure(weight: np.ndarray, bias: torch.Tensor | None, tokens: int, found: list[dict[str, Any]]) -> FormatChoice:
    rows, cols = weight.shape
    x = torch.randn(tokens, cols)
    dense = torch.from_numpy(weight)
    runs = [partial(run, sparse_linear, x, torch.from_numpy(pack(weight, **p)), bias, rows, 0) for p in found]
    with torch.inference_mode():
        cold = np.zeros(EVICT_BYTES // 8) if tokens <= FEW_TOKENS and found else None
        dense_us, *sparse = interleaved([lambda: torch.nn.functional.linear(x, dense, bias), *runs], cold)
    if not sparse or min(sparse) > WORTH * dense_us:
        return FormatChoice(None, dense_us, min(sparse, default=dense_us))
    return FormatChoice(found[int(np.argmin(sparse))], dense_us, min(sparse))


def interleaved(functions: list[Callable[[], object]], cold: np.ndarray | None = None) -> list[float]:
    """The lower quartile of the times of each function in microseconds, taken in turns so that load hits all alike.

    What is in the upper half tells more of a neighbour than of the function.

    With `cold`, an array larger than the caches, each run starts with the weights out of them.
    """
    samples: list[list[float]] = [[] for _ in functions]
    for f in functions:
        f()
    end = time.perf_counter() + SECONDS_A_CANDIDATE * len(functions)
    while len(samples[0]) < 5 or (time.perf_counter() < end and len(samples[0]) < 51):
        for f, took in zip(functions, samples, strict=True):
            if cold is not None:
                cold.max()
            start = time.perf_counter()
            f()
            took.append((time.perf_counter() - start) * 1e6)
    return [float(np.percentile(took, 25)) for took in samples]


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
