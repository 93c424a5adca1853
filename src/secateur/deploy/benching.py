"""bench: saved models on every runtime at hand, in turn, with what they weigh, need and take."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy import device, signature, target
from secateur.deploy.exporting import export
from secateur.deploy.results import Bench, Timing, short_names, timed, words
from secateur.deploy.target import TARGETS, DeployError
from secateur.errors import SecateurError

OURS = ("torch", "secateur")
RUNTIMES = (*OURS, *TARGETS)
ALIASES = {"onnxruntime": "onnx", "pytorch": "torch"}
Say = Callable[[str], None]


def installed() -> list[str]:
    """The runtimes that can run here."""
    found = list(OURS)
    for name in TARGETS:
        try:
            target.find(name)
        except SecateurError:
            continue
        found.append(name)
    return found


def check_runtimes(names: Sequence[str] | None) -> list[str]:
    """Runtimes by the names that people use; DeployError for an unknown one or one that is not installed."""
    if names is None:
        return installed()
    found = [ALIASES.get(name, name) for name in names]
    for name in found:
        if name not in RUNTIMES:
            raise DeployError(f"no runtime {name!r}; there is {', '.join(RUNTIMES)}")
        if name in TARGETS:
            target.find(name)
    return list(dict.fromkeys(found))


def names_of(sources: Sequence[Path | str]) -> dict[str, Path]:
    """A short name for each folder: its last part, or enough of it to tell them apart."""
    folders = [Path(source) for source in sources]
    if not folders:
        raise DeployError("bench needs at least one folder of a model or an artefact")
    for folder in folders:
        if not folder.is_dir():
            raise DeployError(f"{folder} is not a folder; pass saved models or exported artefacts")
    names = short_names(folders)
    return {
        n if names.count(n) == 1 else f"{n} ({i + 1})": f for i, (n, f) in enumerate(zip(names, folders, strict=True))
    }


def bench(
    sources: Sequence[Path | str],
    runtimes: Sequence[str] | None = None,
    *,
    batch: Sequence[int] = (8,),
    length: Sequence[int] = (64,),
    threads: int = 1,
    turns: int = 12,
    int8: bool = False,
    say: Say = lambda text: None,
    **options: Any,
) -> Bench:
    """Export folders to runtimes (default: all that are installed), check parity, and time them side by side.

    sources: model folders, the first being what others are compared with; or artefacts, each timed on its own runtime.
    batch, length: every pair is measured. threads: of each process, pinned. turns: rounds of A B A B ...
    int8: with 8-bit weights on top where the runtime has them. options: for loading a folder.

    What a runtime refuses is a row with an `error`. Raises DeployError for folders or names that are wrong.
    """
    named, chosen = names_of(sources), check_runtimes(runtimes)
    for value in (*batch, *length):
        if value < 1:
            raise DeployError(f"batch and length are at least 1, not {value}")
    timings: list[Timing] = []
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as work:
        for runtime in chosen:
            for shape, artefacts in prepared(named, runtime, batch, length, Path(work), int8, say, options, timings):
                say(f"{runtime}: batch {shape[0]} x {shape[1]}")
                rows = device.measure(artefacts, *shape, threads, turns)
                timings += timed(rows, artefacts, runtime, shape)
    order = {name: i for i, name in enumerate(named)}
    timings.sort(key=lambda t: (chosen.index(t.runtime), t.batch, t.length, order[t.model]))
    return Bench(timings, words(timings), threads, device.machine())


def prepared(
    named: Mapping[str, Path],
    runtime: str,
    batch: Sequence[int],
    length: Sequence[int],
    work: Path,
    int8: bool,
    say: Say,
    options: Mapping[str, Any],
    failed: list[Timing],
) -> Iterator[tuple[tuple[int, int], dict[str, Path]]]:
    """Each shape with the artefacts that run it; a target of fixed shape is exported anew for each."""
    kept: dict[str, Path] = {}
    fixed = runtime in TARGETS and target.find(runtime).shapes == "fixed"
    for b in batch:
        for n in length:
            artefacts = {}
            for name, folder in named.items():
                try:
                    if fixed or name not in kept:
                        say(f"{runtime}: {name}")
                        sizes = (b, n) if fixed else (max(batch), max(length))
                        place = work / f"{runtime}-{len(list(work.iterdir()))}"
                        kept[name] = artefact(folder, runtime, place, sizes, int8, options)
                    artefacts[name] = kept[name]
                except SecateurError as error:
                    failed.append(Timing(name, runtime, b, n, error=str(error)))
            if artefacts:
                yield (b, n), artefacts


def artefact(
    folder: Path, runtime: str, place: Path, sizes: tuple[int, int], int8: bool, options: Mapping[str, Any]
) -> Path:
    """An artefact of the folder for a runtime: the folder itself, or what is made from it at `place`."""
    if (folder / device.MANIFEST).is_file():
        made_for = target.read(folder)["target"]
        if made_for != runtime:
            raise DeployError(f"{folder} is an artefact for {made_for}")
        return folder
    if int8 and (runtime in OURS or not target.find(runtime).int8):
        raise DeployError(f"{runtime} gets no 8-bit weights here")
    if runtime in OURS:
        import torch

        from secateur.deploy import torch as ours
        from secateur.torch.open import load_model

        ours.write(load_model(folder, dtype=torch.float32, **options), folder, runtime, place, **options)
        return place
    kind = target.find(runtime)
    bounds: dict[str, Any] = {}
    if kind.shapes != "any":
        bounds = {"batch": sizes[0]} | ({"length": sizes[1]} if takes_tokens(folder, options) else {})
    export(folder, runtime, place, int8=int8, **bounds, **options)
    return place


def takes_tokens(folder: Path, options: Mapping[str, Any]) -> bool:
    """Whether the model in a folder takes tokens, so that its inputs have a length."""
    from secateur.torch.open import load_model

    model = load_model(folder, **options)
    return any("length" in port.shape for port in signature.ports_of(model, signature.inputs_of(model)))
