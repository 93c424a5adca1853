"""bench: saved models on every runtime at hand, in turn, with what they weigh, need and take."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.deploy import runner, target
from secateur.deploy.gguf.export import export_gguf, require
from secateur.deploy.jobs import torch_runtimes
from secateur.deploy.jobs.export import export, load_for
from secateur.deploy.jobs.results import Bench, Timing, in_words, short_names, words
from secateur.deploy.jobs.timing import Say, Shape, in_turn
from secateur.deploy.target import GGUF, TARGETS, DeployError
from secateur.deploy.targets.inputs import inputs_of, ports_of
from secateur.errors import SecateurError, meant
from secateur.torch.files.saving import has_schedule
from secateur.torch.tokens.install import all_tokens

OURS = ("torch", "secateur")
RUNTIMES = (*OURS, *TARGETS)
"""The runtimes of any model, which a search can aim at too. llama.cpp runs few models; name it to time it."""
ALIASES = {"onnxruntime": "onnx", "pytorch": "torch", "llama.cpp": GGUF}


def installed() -> list[str]:
    """Those of `RUNTIMES` that can run here."""
    names = list(OURS)
    for name in TARGETS:
        try:
            target.find(name)
        except SecateurError:
            continue
        names.append(name)
    return names


def check_runtimes(names: Sequence[str] | None) -> list[str]:
    """Runtimes by the names that people use; DeployError for an unknown one or one that is not installed."""
    if names is None:
        return installed()
    chosen = [ALIASES.get(name, name) for name in names]
    known = (*RUNTIMES, GGUF)
    for name in chosen:
        if name not in known:
            raise DeployError(f"no runtime {name!r}; there is {', '.join(known)}{meant(name, known)}")
        if name in TARGETS:
            target.find(name)
        if name == GGUF:
            require()
    return list(dict.fromkeys(chosen))


def names_of(sources: Sequence[Path | str]) -> dict[str, Path]:
    """A short name for each folder: its last part, or enough of its path to be another than the rest."""
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
    check: bool = False,
    say: Say = lambda text: None,
    **options: Any,
) -> Bench:
    """Export folders to runtimes (default: all that are installed), check parity, and time them side by side.

    sources: model folders, with the first of which all are compared; or artefacts, each timed on its own runtime.
    batch, length: every pair is measured; models that take no tokens have no length. threads: of each process, pinned.
    turns: rounds of A B A B ...
    int8: with 8-bit weights on top where the runtime has them.
    check: compare the files of artefacts with the SHA-256 that `export` noted, before anything runs.
    options: for loading a folder, as `secateur.open` takes them; `task` names what the models are for.

    A folder with a schedule of tokens is timed without it too, and a sentence says where the schedule brings nothing.
    What a runtime refuses is a row with an `error`. Raises DeployError for folders or names that are wrong,
    `results.BenchInterrupted` with the complete rows when Ctrl-C comes after the first of them.
    """
    chosen = check_runtimes(runtimes)
    named, whole = with_all_tokens(names_of(sources))
    if check:
        check_hashes(list(named.values()))

    def make(name: str, runtime: str, destination: Path, shape: Shape) -> Path:
        every = name in whole.values()
        return artefact(named[name], runtime, destination, shape, int8=int8, every_token=every, loading=options)

    def fixed(runtime: str) -> bool:
        return runtime in TARGETS and target.find(runtime).shapes == "fixed"

    # This goes to the processes that open the folders on their command line, where other users could read a token.
    loading = {k: v for k, v in options.items() if isinstance(v, str | bool | int) and k != "token"}

    def result(timings: list[Timing]) -> Bench:
        return Bench(timings, [*words(timings), *slower_with_schedule(timings, whole)], threads, runner.machine())

    sizes: dict[str, Any] = {"threads": threads, "turns": turns, "loading": loading}
    return in_turn(list(named), chosen, batch, length, make, fixed, result=result, say=say, **sizes)


def with_all_tokens(named: Mapping[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """The folders by name, and before each with a schedule of tokens the same folder without it.

    Returns them, and for each name with a schedule that without it.
    """
    found: dict[str, Path] = {}
    whole: dict[str, str] = {}
    for name, folder in named.items():
        if not (folder / runner.MANIFEST).is_file() and has_schedule(folder):
            whole[name] = f"{name}, all tokens"
            found[whole[name]] = folder
        found[name] = folder
    return found, whole


def slower_with_schedule(timings: Sequence[Timing], whole: Mapping[str, str]) -> list[str]:
    """A sentence for each runtime and shape where a schedule of tokens brings nothing.

    whole: as `with_all_tokens` gives it.
    """
    rows = {(t.model, t.runtime, t.batch, t.length): t for t in timings}
    sentences = []
    for t in timings:
        other = rows.get((whole.get(t.model, ""), t.runtime, t.batch, t.length))
        if other is not None and not t.error and not other.error and t.median_ms >= other.median_ms:
            sentences.append(
                f"the schedule of tokens brings nothing on {t.runtime} at {in_words(t.batch, t.length)}: {t.model} "
                f"takes {t.median_ms / other.median_ms:.2f} of the time of all tokens; leave it off there"
            )
    return sentences


def check_hashes(folders: Sequence[Path]) -> None:
    """DeployError for a folder that is no artefact, or an artefact with files that have changed since its export."""
    for folder in folders:
        target.verify_files(folder)


def artefact(
    folder: Path,
    runtime: str,
    destination: Path,
    shape: Shape,
    *,
    int8: bool = False,
    every_token: bool = False,
    quantize: str | None = None,
    loading: Mapping[str, Any],
) -> Path:
    """An artefact of the folder for a runtime: the folder itself, or what is made from it at `destination`.

    shape: the largest, or the only one that the runtime then takes. every_token: without the schedule of tokens that
    the folder remembers. quantize: the format of the weights on llama.cpp, by default that which `int8` says.
    loading: options for loading the folder.
    """
    if (folder / runner.MANIFEST).is_file():
        made_for = target.read(folder)["target"]
        if made_for not in (*TARGETS, GGUF):
            raise DeployError(
                f"{folder} is for {made_for!r}; times are taken of exports for {', '.join((*TARGETS, GGUF))}, or of "
                "models"
            )
        if made_for != runtime:
            raise DeployError(f"{folder} is an artefact for {made_for}")
        return folder
    if runtime == GGUF:
        options = {name: value for name, value in loading.items() if name != "task"}
        export_gguf(folder, destination, quantize=quantize or ("q8_0" if int8 else "f16"), **options)
        return destination
    if int8 and (runtime in OURS or not target.find(runtime).int8):
        raise DeployError(f"{runtime} gets no 8-bit weights here")
    if runtime in OURS:
        model = load_for(folder, **{"dtype": torch.float32, **loading})
        trusted = bool(loading.get("trust_remote_code"))
        torch_runtimes.write(model, folder, runtime, destination, every_token=every_token, trust_remote_code=trusted)
        return destination
    bounds: dict[str, Any] = {}
    if target.find(runtime).shapes != "any":
        bounds = {"batch": shape[0]} | ({"length": shape[1]} if takes_tokens(folder, loading) else {})
    with all_tokens() if every_token else contextlib.nullcontext():
        export(folder, runtime, destination, int8=int8, **bounds, **loading)
    return destination


def takes_tokens(folder: Path, loading: Mapping[str, Any]) -> bool:
    """Whether the model in a folder takes tokens, so that its inputs have a length."""
    model = load_for(folder, **loading)
    return any("length" in port.shape for port in ports_of(model, inputs_of(model)))
