"""Measure: the dense model and a smaller one on a runtime, timed in turn in processes of their own, until it is known
how much faster the smaller one is.
"""

import contextlib
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.deploy import runner, target
from secateur.deploy.jobs.bench import artefact, check_runtimes
from secateur.deploy.jobs.export import of_config
from secateur.deploy.jobs.pairs import Pairs, quartiles_ms, time_pairs
from secateur.deploy.jobs.timing import Say
from secateur.deploy.operator_library import installed_library
from secateur.search.target import Call
from secateur.tasks.find import task_of_config
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.files.saving import CONFIG
from secateur.torch.open import read_config

WITHIN = 0.015
"""Half width of the 95% interval of a speed-up, relative, at which timing ends."""
MOST_S = 40.0
"""Seconds of timing for each of the two, whatever the interval."""


@dataclass(frozen=True)
class Measured:
    """Two models on one runtime.

    runtime, batch, length, threads: the call. length: 0 where the model takes no tokens.
    dense_ms, ms: median milliseconds of a call of the dense model and of the smaller one.
    speed_up: median over turns of the dense time over the other. interval: its 95% interval. spread: its quartiles.
    turns: how often each was timed.
    dense_bytes, bytes: of the files of the artefacts. dense_memory, memory: peak bytes of the processes, 0 where the
        system reports none.
    parity: how far the program of the smaller model is from PyTorch (`secateur.deploy.jobs.results.Parity`); None where
        the runtime is PyTorch.
    token_speed_up: of a decoder, the speed-up of a call of one token in each row, without a cache of earlier ones; None
        elsewhere. token_ms: milliseconds of such a call.
    dense_artefact, artefact: what was timed; they lie where the caller asked for.
    dense_spread_ms, spread_ms: quartiles of `dense_ms` and of `ms`; None where they are not known.
    quantize: the format of both models' weights on llama.cpp; None elsewhere.
    """

    runtime: str
    batch: int
    length: int
    threads: int
    dense_ms: float
    ms: float
    speed_up: float
    interval: tuple[float, float]
    spread: tuple[float, float]
    turns: int
    dense_bytes: int
    bytes: int
    dense_memory: int
    memory: int
    parity: Mapping[str, Any] | None
    token_speed_up: float | None
    token_ms: float | None
    dense_artefact: Path
    artefact: Path
    dense_spread_ms: tuple[float, float] | None = None
    spread_ms: tuple[float, float] | None = None
    quantize: str | None = None

    @property
    def share(self) -> float:
        """The latency relative to that of the dense model."""
        return 1.0 / self.speed_up

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the folders, which may be gone by the time that they are read."""
        values = asdict(self)
        del values["dense_artefact"], values["artefact"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def measure(
    dense: Path,
    folder: Path,
    call: Call,
    work: Path,
    *,
    dense_artefact: Path | None = None,
    loading: Mapping[str, Any] | None = None,
    within: float = WITHIN,
    most_s: float = MOST_S,
    say: Say = lambda text: None,
) -> Measured:
    """Export two model folders to the runtime of a call, and time them in turn.

    work: a folder for the artefacts, which stay there.
    dense_artefact: that of the dense model, where an earlier measurement of the same call made it.
    loading: options for opening the folders, as `secateur.open` takes them.
    within, most_s: timing ends when the speed-up is known so well, or after so many seconds for each of the two.

    Raises DeployError when the runtime is not there, refuses a model, or computes something else than PyTorch.
    """
    runtime, options = check_runtimes([call.runtime])[0], dict(loading or {})
    shape = call.batch, call.length
    made = {}
    for name, source in (("dense", dense), ("pruned", folder)):
        if name == "dense" and dense_artefact is not None:
            made[name] = dense_artefact
            continue
        say(f"{runtime}: {source.name}")
        work.mkdir(parents=True, exist_ok=True)
        place = unused(work, f"{runtime}-{name}")
        made[name] = artefact(source, runtime, place, shape, quantize=call.quantize, loading=options)
    infos = {name: target.read(place) for name, place in made.items()}
    call = replace(call, length=call.length if runner.takes_tokens(infos["dense"]) else 0)
    # These go to the processes that open the folders on their command line, where other users could read a token.
    ours = {k: v for k, v in options.items() if isinstance(v, str | bool | int) and k != "token"}
    pairs, memory = _timed(made, call, ours, within, most_s)
    token: Pairs | None = None
    if call.length > 1 and takes_any_length(infos["dense"]) and writes_texts(dense, options):
        token, _ = _timed(made, replace(call, length=1), ours, within, most_s)
    low, high = pairs.interval
    first, third = pairs.quartiles
    return Measured(
        runtime=runtime,
        batch=call.batch,
        length=call.length,
        threads=call.threads,
        dense_ms=1e3 * statistics.median(pairs.first),
        ms=1e3 * statistics.median(pairs.second),
        speed_up=1 / pairs.ratio,
        interval=(1 / high, 1 / low),
        spread=(1 / third, 1 / first),
        turns=len(pairs.first),
        dense_bytes=infos["dense"]["bytes"],
        bytes=infos["pruned"]["bytes"],
        dense_memory=memory[0],
        memory=memory[1],
        parity=infos["pruned"].get("parity"),
        token_speed_up=None if token is None else 1 / token.ratio,
        token_ms=None if token is None else 1e3 * statistics.median(token.second),
        dense_artefact=made["dense"],
        artefact=made["pruned"],
        dense_spread_ms=quartiles_ms(pairs.first),
        spread_ms=quartiles_ms(pairs.second),
        quantize=call.quantize,
    )


def unused(work: Path, name: str) -> Path:
    """A path under `work` that does not exist yet."""
    return next(path for path in (work / f"{name}{i or ''}" for i in itertools.count()) if not path.exists())


def writes_texts(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether the model in a folder is a decoder, which goes on with a text token by token."""
    if not (folder / CONFIG).is_file():
        return False
    return task_of_config(read_config(folder, **of_config(options))) is TextGeneration


def takes_any_length(info: Mapping[str, Any]) -> bool:
    """Whether an artefact leaves the length of its tokens open."""
    ports = info["graphs"]["model"]["inputs"]
    return any("length" in port["shape"] for port in ports)


def _timed(
    made: Mapping[str, Path], call: Call, loading: Mapping[str, Any], within: float, seconds: float
) -> tuple[Pairs, tuple[int, int]]:
    """Times of the dense artefact and the pruned one at one call, and the peak bytes of their processes."""
    library = installed_library()
    workers: list[runner.Worker] = []
    with target.translated(), contextlib.ExitStack() as stack:
        for name in ("dense", "pruned"):
            worker = runner.Worker(made[name], call.batch, call.length, call.threads, library, ours=loading)
            stack.callback(worker.stop)
            workers.append(worker)
        pairs = time_pairs(workers[0], workers[1], within=within, seconds=seconds)
        for worker in workers:
            worker.close()
        return pairs, (workers[0].peak_bytes, workers[1].peak_bytes)
