"""One-shot pruning block by block: read a block, run the calibration states through it, prune it, write it, go on.

The states that a block sees come from the pruned blocks before it. `prune_folder` holds one block in memory and can be
killed at any moment; `prune_loaded` does the same to a model in memory, by the same code and to the same bits.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._version import __version__
from secateur.errors import ModelError, PlanError, SecateurError
from secateur.layout import Layout
from secateur.recipe import Recipe
from secateur.torch.base.batches import evaluating
from secateur.torch.base.compute_type import computing_in, fast_bfloat16
from secateur.torch.blockwise.block_calls import chains
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.prune_block import counted, left_out
from secateur.torch.blockwise.walk import Done, Run
from secateur.torch.data.token_windows import batches_of, windows_hash
from secateur.torch.files.safetensors_header import TYPES, read_entries
from secateur.torch.files.safetensors_shards import file_hash, read_tensor, write_shard
from secateur.torch.stream.block_shares import by_outliers
from secateur.torch.stream.distil_whole import coming_again, distil
from secateur.torch.stream.journal import Workspace, workspace
from secateur.torch.stream.lazy_model import COMPUTE, Skeleton
from secateur.torch.stream.memory_plan import MemoryPlan, choose, give_back, whole_model
from secateur.torch.stream.run_result import RunReport, finish, record_of, shard_name
from secateur.torch.stream.sensitivity import by_sensitivity
from secateur.torch.trace.derive import trace

Progress = Callable[[Done], None]
Tuning = Callable[[int, int, float], None]
"""Told step, steps and loss."""
Survey = Callable[[int, int], None]
"""Told step and steps of what is looked at before the first block."""


def prune_loaded(
    model: nn.Module,
    windows: torch.Tensor | None,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    tuning: Tuning | None = None,
) -> RunReport:
    """Prune a Hugging Face model in memory, block by block, in place. It computes in float32, whatever it is stored as.

    windows: token ids (windows, context) to calibrate on; None where the recipe reads no text (`Recipe.readers`).
    progress: told of each block; tuning: of each step of distillation.
    Raises PlanError for a pattern that does not fit, ModelError for a model without a chain of layers, or in float64.
    """
    from secateur.torch.data.example import example_for

    layout = trace(model, example_for(model))
    paths = [p for c in chains(layout).values() for p in c]
    choice = _chosen(layout, model, paths, 0, windows, recipe)
    batches = _batches(model, windows, choice.batch)
    run = Run(model, layout, batches if recipe.walks else [], recipe, States(None), fast_bfloat16())
    records = []
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    with evaluating(model), _no_gradients(model), computing_in(model, COMPUTE):
        dense = copy.deepcopy(model) if recipe.distil else None
        if recipe.owl:
            run.shares = _allocated(Run(model, layout, batches, recipe, States(None)), _nothing, _nothing)
        if recipe.sensitivity:
            assert windows is not None
            run.shares = by_sensitivity(model, layout, windows, recipe)
        while len(run.finished) < run.total:
            path = run.next_block()
            done = run.prune(path, dtypes.__getitem__)
            if run.batches and done.number < run.total:
                run.advance("pruned", model.get_submodule(path))
            run.close(path)
            records.append(record_of(done, ""))
            if progress:
                progress(done)
        distilled = None
        if recipe.distil:
            assert windows is not None
            distilled = distil(model, dense, records, windows, recipe, dtypes.__getitem__, fast_bfloat16(), tuning)
    return RunReport(None, tuple(records), tuple(left_out(layout, model, paths)), distilled=distilled)


@contextlib.contextmanager
def _no_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient: attention picks other kernels for masks that do."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def prune_folder(
    source: Path,
    output: Path,
    windows: torch.Tensor | None,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    began: Callable[[MemoryPlan, int], None] | None = None,
    survey: Survey | None = None,
    tuning: Tuning | None = None,
) -> RunReport:
    """Prune a Hugging Face folder into another, one block in memory at a time; a killed run is taken up where it was.

    windows, progress, tuning: as in `prune_loaded`. began: told the choice of memory and how many blocks were done
    before. survey: told of each step of what deals out the sparsity before the first block.

    Raises SecateurError when `output` exists or belongs to a run with other settings; ModelError for damaged folders.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise SecateurError(f"{output} is the model itself, which is read to the end; choose another output")
    skeleton = Skeleton(Path(source), recipe.task)
    layout = skeleton.layout()
    paths = [p for c in chains(layout).values() for p in c]
    skeleton.check(paths)
    identity = _identity(skeleton, windows, recipe)
    with workspace(Path(output), identity, overwrite) as work:
        resumed = len(work.journal.blocks)
        if not work.journal.finished:
            settings = _settings(work, layout, skeleton, paths, windows, recipe)
            if began:
                began(MemoryPlan(settings["batch"], settings["on_disk"], settings["expected"]), resumed)
            _walk(work, layout, skeleton, paths, windows, recipe, progress, survey)
            if recipe.distil and work.journal.distilled is None:
                _distil_folder(work, skeleton, windows, recipe, tuning)
        return finish(work, layout, skeleton, paths, resumed)


def _settings(
    work: Workspace,
    layout: Layout,
    skeleton: Skeleton,
    paths: Sequence[str],
    windows: torch.Tensor | None,
    recipe: Recipe,
) -> dict[str, Any]:
    """What a run chooses at its start and keeps to when it is taken up again: see `Journal.settings`."""
    settings = work.journal.settings
    if settings:
        torch.set_num_threads(settings["threads"])
    else:
        choice = _chosen(layout, skeleton.model, paths, _outside(skeleton, paths), windows, recipe)
        settings.update(asdict(choice), threads=torch.get_num_threads(), bfloat16=fast_bfloat16())
        work.commit()
    return settings


def _walk(
    work: Workspace,
    layout: Layout,
    skeleton: Skeleton,
    paths: list[str],
    windows: torch.Tensor | None,
    recipe: Recipe,
    progress: Progress | None,
    survey: Survey | None,
) -> None:
    """Deal out the sparsity where the recipe asks for that, take up what was done before, and prune what is left."""
    settings = work.journal.settings
    states = States(work.folder / "states" if settings["on_disk"] else None)
    batches = _batches(skeleton.model, windows, settings["batch"])
    run = Run(skeleton.model, layout, batches if recipe.walks else [], recipe, states, settings["bfloat16"])
    with skeleton.filled_on_demand(paths), torch.no_grad(), _old_objects_frozen():
        if (recipe.owl or recipe.sensitivity) and "sparsity" not in settings:
            if recipe.owl:
                place = work.folder / "survey" if settings["on_disk"] else None
                walk = Run(skeleton.model, layout, batches, recipe, States(place))
                settings["sparsity"] = _allocated(walk, skeleton.load, skeleton.release, survey)
            else:
                settings["sparsity"] = _by_sensitivity(skeleton, layout, windows, recipe, survey)
            work.commit()
        run.shares = settings.get("sparsity", {})
        _catch_up(run, work, skeleton)
        while len(run.finished) < run.total:
            done = _one_block(run, work, skeleton)
            if progress:
                progress(done)


@contextlib.contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """The collector, which runs after each block, looks only at objects that are younger than this context."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _one_block(run: Run, work: Workspace, skeleton: Skeleton) -> Done:
    path = run.next_block()
    skeleton.load(path)
    done = run.prune(path, lambda name: _stored(skeleton, name))
    pruned = {name: skeleton.model.get_parameter(name) for name in (layer.name for layer in done.layers)}
    parts: dict[str, Any] = {name: skeleton.entries[name] for name in skeleton.names_under(path)}
    for name, parameter in pruned.items():
        source = skeleton.source(name)
        assert source is not None
        parts[source] = parameter.detach().to(_stored(skeleton, name))
    file = shard_name(done.number, run.total)
    digest = write_shard(work.result / file, parts, work.folder)
    if run.batches and done.number < run.total:
        run.advance("pruned", skeleton.model.get_submodule(path))
    record = record_of(done, file)
    work.journal.blocks.append({**record, "sha256": digest, "seconds": done.seconds})
    work.journal.states = run.states.record(run.stale(path))
    work.commit()
    run.close(path)
    skeleton.release(path)
    give_back()
    return done


def _nothing(path: str) -> None:
    """A model in memory has its blocks."""


def _allocated(
    walk: Run, load: Callable[[str], None], release: Callable[[str], None], survey: Survey | None = None
) -> dict[str, float]:
    walk.dense = False
    assert walk.recipe.owl is not None
    assert walk.recipe.sparsity is not None
    return by_outliers(walk, walk.recipe.owl, walk.recipe.sparsity, load, release, survey)


def _by_sensitivity(
    skeleton: Skeleton, layout: Layout, windows: torch.Tensor | None, recipe: Recipe, survey: Survey | None
) -> dict[str, float]:
    from secateur.torch.open import load_model

    assert windows is not None
    model = load_model(skeleton.folder, task=recipe.task, dtype=COMPUTE).requires_grad_(False)
    with evaluating(model):
        return by_sensitivity(model, layout, windows, recipe, survey)


def _distil_folder(work: Workspace, skeleton: Skeleton, windows: Any, recipe: Recipe, tuning: Tuning | None) -> None:
    """Distil the finished blocks and write them anew; what is killed before the journal says so is done again."""
    from secateur.torch.open import load_model

    blocks = work.journal.blocks
    model = load_model(skeleton.folder, task=recipe.task, dtype=torch.float32).requires_grad_(False)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for block in blocks:
            entries = read_entries(work.result / block["file"])
            for layer in block["layers"]:
                source = skeleton.source(layer["name"])
                assert source is not None
                model.get_parameter(layer["name"]).copy_(read_tensor(entries[source]))
    low = work.journal.settings["bfloat16"]
    with evaluating(model), evaluating(dense):
        found = distil(model, dense, blocks, windows, recipe, lambda name: _stored(skeleton, name), low, tuning)
    work.tuned.mkdir(exist_ok=True)
    for block in blocks:
        parts: dict[str, Any] = dict(read_entries(work.result / block["file"]))
        for layer in block["layers"]:
            name = layer["name"]
            parts[skeleton.source(name) or ""] = model.get_parameter(name).detach().to(_stored(skeleton, name))
        block["sha256"] = write_shard(work.tuned / block["file"], parts, work.folder)
    work.journal.distilled = list(found)
    work.commit()
    work.promote()


def _stored(skeleton: Skeleton, name: str) -> torch.dtype:
    source = skeleton.source(name)
    if source is None:
        raise PlanError(f"{name} is made of several tensors of the files, so it cannot be pruned block by block")
    return TYPES[skeleton.entries[source].dtype]


def _catch_up(run: Run, work: Workspace, skeleton: Skeleton) -> None:
    """Take up the states of an interrupted run, from disk where they are whole, else by running the finished blocks."""
    blocks = work.journal.blocks
    for block in blocks:
        file = work.result / block["file"]
        if not file.is_file() or file_hash(file) != block["sha256"]:
            raise ModelError(f"{file} is not what the run wrote; delete {work.folder} to start over")
    if len(blocks) == run.total or run.states.restore(work.journal.states):
        run.finished = [block["path"] for block in blocks]
        return
    for block in blocks if run.batches else ():
        if len(run.finished) + 1 == run.total:
            run.finished.append(block["path"])
            break
        path = block["path"]
        if run.dense:
            skeleton.load(path)
            run.advance("dense", run.model.get_submodule(path))
        entries = read_entries(work.result / block["file"])
        written = {layer["name"]: entries[skeleton.source(layer["name"]) or ""] for layer in block["layers"]}
        skeleton.load(path, written)
        run.advance("pruned", run.model.get_submodule(path))
        run.close(path)
        skeleton.release(path)
    run.finished = [block["path"] for block in blocks]


def _identity(skeleton: Skeleton, windows: torch.Tensor | None, recipe: Recipe) -> dict[str, Any]:
    import transformers

    files = sorted({entry.file for entry in skeleton.entries.values()})
    return {
        "recipe": recipe.identity(),
        "model": {file.name: file_hash(file) for file in (*files, skeleton.folder / "config.json")},
        "calibration": {"tokens": windows_hash(windows)},
        "version": {
            "secateur": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _chosen(
    layout: Layout, model: Any, paths: Sequence[str], outside: int, windows: torch.Tensor | None, recipe: Recipe
) -> MemoryPlan:
    """What the run may take, all of its stages counted; PlanError when one of them does not fit, or lacks text."""
    count, context = (0, 1) if windows is None else windows.shape
    if windows is None and recipe.readers:
        raise PlanError(f"{recipe.readers[0]} needs calibration text; pass --calibration FILE")
    peaks = []
    trained = [name for path in paths for name in counted(layout, model, path)]
    if recipe.sensitivity:
        what = "sensitivity holds the dense model, a pruned one and its gradients"
        instead = "owl, which goes block by block, or a shorter context"
        peaks.append(whole_model(model, trained, context, 1, recipe.memory, what, instead))
    if recipe.distil:
        what = "distillation holds the dense and the pruned model, gradients and moments"
        instead = "reconstruct, which goes block by block, or a shorter context"
        tokens = recipe.distil.windows * context
        again = coming_again(count, recipe.distil.passes) * context
        peaks.append(whole_model(model, trained, tokens, 3, recipe.memory, what, instead, kept=again))
    if not (recipe.walks or recipe.owl):
        count, context = 0, 1
    tuned = recipe.reconstruct is not None
    found = choose(layout, paths, outside, count, context, recipe.memory, dense=tuned, tuned=tuned)
    batch = min(found.batch, recipe.reconstruct.windows) if recipe.reconstruct else found.batch
    return MemoryPlan(batch, found.on_disk, max([found.expected, *peaks]))


def _outside(skeleton: Skeleton, paths: Sequence[str]) -> int:
    """Bytes, in the type of computation, of the largest parameter outside the blocks: the embeddings as a rule."""
    inside = {name for path in paths for name in skeleton.names_under(path)}
    sizes = [
        e.bytes // (2 if e.dtype in ("BF16", "F16") else 4) for n, e in skeleton.entries.items() if n not in inside
    ]
    return 4 * max(sizes, default=0)


def _batches(model: Any, windows: torch.Tensor | None, size: int) -> list[dict[str, Any]]:
    return [] if windows is None else batches_of(model, windows, size)
