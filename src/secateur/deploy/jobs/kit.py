"""Export kits: a folder that times artefacts on another machine with one script, and its results read back."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.deploy import runner, target
from secateur.deploy.jobs.bench import OURS, artefact, check_hashes, check_runtimes, names_of
from secateur.deploy.jobs.results import Bench, Timing, words
from secateur.deploy.jobs.timing import Say
from secateur.deploy.target import DeployError
from secateur.errors import SecateurError
from secateur.files import new_folder, write_json
from secateur.kernels.native import onnx_library
from secateur.schemas import reading
from secateur.schemas import results as schema


def write_kit(
    sources: Sequence[Path | str],
    folder: Path | str,
    runtimes: Sequence[str] | None = None,
    *,
    batch: Sequence[int] = (8,),
    length: Sequence[int] = (64,),
    threads: int = 1,
    turns: int = 12,
    int8: bool = False,
    check: bool = False,
    overwrite: bool = False,
    say: Say = lambda text: None,
    **options: Any,
) -> list[str]:
    """Write artefacts and `device.py` (which needs numpy and the runtimes only) into a folder.

    The arguments are those of `bench`. Returns what could not be exported, one sentence each.

    Raises DeployError when nothing could be exported, or when a runtime is asked for that needs secateur itself.
    """
    named = names_of(sources)
    if check:
        check_hashes(list(named.values()))
    chosen, refused = _portable(runtimes, one_shape=len(batch) == len(length) == 1)
    names: dict[str, dict[str, str]] = {}
    described: list[dict[str, Any]] = []
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    with new_folder(Path(folder), overwrite=overwrite) as work:
        for runtime in chosen:
            for number, (name, source) in enumerate(named.items()):
                say(f"{runtime}: {name}")
                destination, shape = work / f"{runtime}-{number}", (max(batch), max(length))
                try:
                    made = artefact(source, runtime, destination, shape, int8=int8, loading=options)
                except SecateurError as error:
                    refused.append(f"{name} on {runtime}: {error}")
                    continue
                if made != destination:
                    shutil.copytree(made, destination, ignore=not_carried)
                info = target.read(destination)
                described.append(info)
                names.setdefault(runtime, {})[name] = destination.name
                sizes.setdefault(runtime, {})[name] = {
                    "bytes": info.get("bytes", 0),
                    "zeros": info.get("zeros", 0.0),
                    "sparse": "sparse" in info,
                }
        if not names:
            raise DeployError(f"nothing could be exported: {'; '.join(refused)}")
        files = hashes(work)  # before the library joins them, whose hash stands by itself
        kit = {
            "batch": list(batch),
            "length": list(length),
            "threads": threads,
            "turns": turns,
            "runtimes": names,
            "sizes": sizes,
            "files": files,
            "library": carry_library(described, work),
        }
        kit["id"] = hashlib.sha256(json.dumps(kit, sort_keys=True).encode()).hexdigest()[:16]
        write_json(work / runner.KIT, kit)
        shutil.copyfile(runner.__file__, work / "device.py")
    return refused


def _portable(runtimes: Sequence[str] | None, *, one_shape: bool) -> tuple[list[str], list[str]]:
    """Runtimes that a kit can carry, and a sentence for each of the others.

    Raises DeployError for one of the latter that was asked for by name.
    """
    chosen: list[str] = []
    refused: list[str] = []
    for name in check_runtimes(runtimes):
        if name in OURS:
            refused.append(f"{name} needs secateur on the device; a kit carries {', '.join(target.TARGETS)}")
        elif name in target.TARGETS and target.find(name).shapes == "fixed" and not one_shape:
            refused.append(f"{name} takes one shape; pass one batch and one length, or leave it out")
        else:
            chosen.append(name)
    if refused and runtimes is not None:
        raise DeployError(refused[0])
    return chosen, refused


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a kit's artefacts by its path in the kit; the script compares them first."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): runner.digest(path) for path in files}


def carry_library(described: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
    """Put the library of operators into a kit if an artefact needs it.

    Returns its SHA-256, which the kit's script checks before it loads the library.
    """
    if not any("operators" in graph for info in described for graph in info["graphs"].values()):
        return None
    path = folder / f"{runner.OPERATORS}.so"
    shutil.copyfile(onnx_library(), path)
    return runner.digest(path)


def not_carried(folder: str, names: list[str]) -> list[str]:
    """What of an artefact's folder does not go into a kit: links, which may point at other files of the user, and
    libraries, which nothing loads."""
    return [name for name in names if name.endswith(".so") or (Path(folder) / name).is_symlink()]


def read_results(path: Path | str) -> Bench:
    """What `device.py` wrote on the device, in the form that `bench` returns.

    path: the kit's folder with `results.json` in it, or the file; a `kit.json` beside it gives sizes.

    Raises DeployError when it is no such file.
    """
    path = Path(path)
    file = path / runner.RESULTS if path.is_dir() else path
    if not file.is_file():
        raise DeployError(f"there is no {file}; run `python device.py` in the kit, on the device, and copy it back")
    remedy = "copy it again"
    data = reading.read_json(file, error=DeployError, remedy=remedy)
    if "format" in data and (type(data["format"]) is not int or data["format"] != runner.FORMAT):
        raise DeployError(f"{file} has format {data['format']!r}; this version reads {runner.FORMAT}")
    source = f"{file} is no result of a kit, or"
    found = reading.check(data, schema.Results, source, error=DeployError, remedy=remedy)
    sizes = _sizes(file.parent / runner.KIT, found.kit)
    firsts: dict[tuple[str, int, int], float] = {}
    timings = []
    for row in found.rows:
        given = row.model_dump(exclude_unset=True)
        if not row.error:
            first = firsts.setdefault((row.runtime, row.batch, row.length), row.median_ms)
            given["ratio"] = row.median_ms / first
        weighs = sizes.get(row.runtime, {}).get(row.model)
        timings.append(Timing(**given, **(weighs.model_dump() if weighs is not None else {})))
    return Bench(timings, words(timings), found.threads, found.machine.model_dump(exclude_unset=True))


def _sizes(path: Path, made_by: str) -> dict[str, dict[str, schema.Sizes]]:
    if not path.is_file():
        return {}
    kit = reading.read(path, schema.Kit, error=DeployError, remedy="copy it again, or read results.json alone")
    if kit.id != made_by:
        raise DeployError(f"the results come from another kit ({made_by}) than {path.parent} ({kit.id})")
    return kit.sizes
