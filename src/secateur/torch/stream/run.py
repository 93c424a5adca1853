"""One-shot pruning block by block: read a block, run the calibration states through it, prune it, write it.

The states that a block reads come from the pruned blocks before it. `prune_folder` has one block in memory and can be
killed at any moment; `prune_loaded` prunes a model in memory by the same code, to the same bits.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
from secateur.torch.blockwise.block_calls import block_paths
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.prune_block import counted, left_out
from secateur.torch.blockwise.walk import Done, Run
from secateur.torch.data.example import example_for
from secateur.torch.data.token_windows import batches_of, windows_hash
from secateur.torch.files.hashes import file_hash
from secateur.torch.files.safetensors_header import read_entries
from secateur.torch.files.safetensors_shards import read_tensor, write_shard
from secateur.torch.open import load_model
from secateur.torch.stream.block_shares import by_outliers
from secateur.torch.stream.distil_whole import coming_again, distil
from secateur.torch.stream.journal import Workspace, workspace
from secateur.torch.stream.lazy_model import COMPUTE, Skeleton
from secateur.torch.stream.memory_plan import MemoryPlan, choose, give_back, whole_model
from secateur.torch.stream.run_result import RunReport, finish, record_of, shard_name
from secateur.torch.stream.sensitivity import by_sensitivity
from secateur.torch.trace.derive import trace

Progress = Callable[[Done], None]
"""Gets each finished block."""
Tuning = Callable[[int, int, float], None]
"""Gets step, steps and loss of distillation."""
Survey = Callable[[int, int], None]
"""Gets step and steps of the stages that read the model before the first block."""


# -- a model in memory ------------------------------------------------------------------------------------------------


def prune_loaded(
    model: nn.Module,
    windows: torch.Tensor | None,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    tuning: Tuning | None = None,
) -> RunReport:
    """Prune a Hugging Face model in memory, block by block, in place; it computes in float32, whatever its type.

    windows: token ids (windows, context) of calibration text; None where the recipe reads none (`Recipe.readers`).

    Raises PlanError for a pattern that does not fit, ModelError for a model without a chain of layers, or in float64.
    """
    layout = trace(model, example_for(model))
    paths = block_paths(layout)
    choice = _plan_memory(layout, model, paths, 0, windows, recipe)
    batches = _batches(model, windows, choice.batch)
    stored = {name: p.dtype for name, p in model.named_parameters()}.__getitem__
    low = fast_bfloat16()
    run = Run(model, layout, batches if recipe.walks else [], recipe, States(None), low_precision=low)
    records = []
    with evaluating(model), _no_gradients(model), computing_in(model, COMPUTE):
        dense = copy.deepcopy(model) if recipe.distil else None
        if recipe.owl:
            survey_walk = Run(model, layout, batches, recipe, States(None))
            run.shares = by_outliers(survey_walk, recipe.owl, recipe.stated_sparsity)
        if recipe.sensitivity:
            run.shares = by_sensitivity(model, layout, _needed(windows, recipe), recipe)
        while len(run.finished) < run.total:
            path = run.next_block()
            done = run.prune(path, stored)
            if run.batches and done.number < run.total:
                run.advance("pruned", model.get_submodule(path))
            run.close(path)
            records.append(record_of(done, ""))
            if progress:
                progress(done)
        distilled = None
        if recipe.distil:
            text = _needed(windows, recipe)
            distilled = distil(model, dense, records, text, recipe, stored=stored, low_precision=low, progress=tuning)
    return RunReport(None, tuple(records), tuple(left_out(layout, model, paths)), distilled=distilled)


@contextlib.contextmanager
def _no_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient: attention uses other kernels for masks that do."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad = required


# -- a folder ---------------------------------------------------------------------------------------------------------


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
    """Prune a Hugging Face folder into another, with one block in memory at a time; a killed run can be continued.

    windows: as in `prune_loaded`.
    began: gets the memory plan, and how many blocks were finished before.

    Raises SecateurError when `output` exists or belongs to a run with other settings; ModelError for damaged folders.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise SecateurError(f"{output} is the model itself, which is read to the end; choose another output")
    skeleton = Skeleton(Path(source), recipe.task)
    layout = skeleton.layout()
    paths = block_paths(layout)
    skeleton.check(paths)
    identity = identity_of(skeleton, windows, recipe.identity())
    with workspace(Path(output), identity, overwrite=overwrite) as work:
        job = _Job(work, skeleton, layout, paths, windows, recipe)
        resumed = len(work.journal.blocks)
        if not work.journal.finished:
            settings = _settings(job)
            if began:
                began(MemoryPlan(settings["batch"], settings["on_disk"], settings["expected"]), resumed)
            _prune_blocks(job, progress, survey)
            if recipe.distil and work.journal.distilled is None:
                _distil_folder(job, tuning)
        return finish(work, layout, skeleton, paths, recipe, resumed)


@dataclass(frozen=True)
class _Job:
    """What all stages of `prune_folder` read."""

    work: Workspace
    skeleton: Skeleton
    layout: Layout
    paths: list[str]
    windows: torch.Tensor | None
    recipe: Recipe


def identity_of(skeleton: Skeleton, windows: torch.Tensor | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the bits of the result: see `Journal.identity`. asked: what is to be done, as JSON."""
    import transformers  # optional

    files = sorted({entry.file for entry in skeleton.entries.values()})
    return {
        "recipe": asked,
        "model": {file.name: file_hash(file) for file in (*files, skeleton.folder / "config.json")},
        "calibration": {"tokens": windows_hash(windows)},
        "version": {
            "secateur": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _settings(job: _Job) -> dict[str, Any]:
    """What a run chooses at its start and keeps when it is continued: see `Journal.settings`."""
    settings = job.work.journal.settings
    if settings:
        torch.set_num_threads(settings["threads"])
    else:
        outside = max(bytes_outside(job.skeleton, job.paths), default=0)
        choice = _plan_memory(job.layout, job.skeleton.model, job.paths, outside, job.windows, job.recipe)
        settings.update(asdict(choice), threads=torch.get_num_threads(), bfloat16=fast_bfloat16())
        job.work.commit()
    return settings


def _prune_blocks(job: _Job, progress: Progress | None, survey: Survey | None) -> None:
    """Find the sparsity of each weight where the recipe asks for that, and prune the blocks that are not finished."""
    work, skeleton, recipe = job.work, job.skeleton, job.recipe
    settings = work.journal.settings
    states = States(work.folder / "states" if settings["on_disk"] else None)
    batches = _batches(skeleton.model, job.windows, settings["batch"])
    low = settings["bfloat16"]
    run = Run(skeleton.model, job.layout, batches if recipe.walks else [], recipe, states, low_precision=low)
    with skeleton.filled_on_demand(job.paths), torch.no_grad(), _old_objects_frozen():
        if (recipe.owl or recipe.sensitivity) and "sparsity" not in settings:
            settings["sparsity"] = _find_sparsities(job, batches, survey)
            work.commit()
        run.shares = settings.get("sparsity", {})
        _catch_up(run, job)
        while len(run.finished) < run.total:
            done = _one_block(run, job)
            if progress:
                progress(done)


@contextlib.contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """The garbage collector, which runs after each block, examines only objects that are younger than this context."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _find_sparsities(job: _Job, batches: Sequence[dict[str, Any]], survey: Survey | None) -> dict[str, float]:
    """The sparsity of each weight, by the outliers of its block or by what it costs in loss."""
    work, skeleton, recipe = job.work, job.skeleton, job.recipe
    if recipe.owl:
        states = States(work.folder / "survey" if work.journal.settings["on_disk"] else None)
        walk = Run(skeleton.model, job.layout, batches, recipe, states)
        load, release = skeleton.load, skeleton.release
        return by_outliers(walk, recipe.owl, recipe.stated_sparsity, load=load, release=release, progress=survey)
    model = load_model(skeleton.folder, task=recipe.task, dtype=COMPUTE).requires_grad_(requires_grad=False)
    with evaluating(model):
        return by_sensitivity(model, job.layout, _needed(job.windows, recipe), recipe, survey)


def _catch_up(run: Run, job: _Job) -> None:
    """Restore the states of an interrupted run: from disk where they are whole, else by running the finished blocks."""
    skeleton, result, blocks = job.skeleton, job.work.result, job.work.journal.blocks
    check_written(job.work)
    if run.batches and len(blocks) < run.total and not run.states.restore(job.work.journal.states):
        for block in blocks:
            path = block["path"]
            if run.dense:
                skeleton.load(path)
                run.advance("dense", run.model.get_submodule(path))
            entries = read_entries(result / block["file"])
            names = [layer["name"] for layer in block["layers"]]
            skeleton.load(path, replaced={name: entries[skeleton.written_name(name)] for name in names})
            run.advance("pruned", run.model.get_submodule(path))
            run.close(path)
            skeleton.release(path)
    run.finished = [block["path"] for block in blocks]


def check_written(work: Workspace) -> None:
    """ModelError when the shard of a finished block is not what was written."""
    for block in work.journal.blocks:
        file = work.result / block["file"]
        if not file.is_file() or file_hash(file) != block["sha256"]:
            raise ModelError(f"{file} is not what the run wrote; delete {work.folder} to start over")


def _one_block(run: Run, job: _Job) -> Done:
    """Read, prune and write the next block; it counts as finished once the journal is written."""
    work, skeleton = job.work, job.skeleton
    path = run.next_block()
    skeleton.load(path)
    done = run.prune(path, skeleton.stored_type)
    parts: dict[str, Any] = {name: skeleton.entries[name] for name in skeleton.names_under(path)}
    for name in (layer.name for layer in done.layers):
        parts[skeleton.written_name(name)] = skeleton.model.get_parameter(name).detach().to(skeleton.stored_type(name))
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


def _distil_folder(job: _Job, tuning: Tuning | None) -> None:
    """Distil the pruned model and write its blocks anew; what is killed before the journal is written is done again."""
    work, skeleton, recipe = job.work, job.skeleton, job.recipe
    blocks = work.journal.blocks
    model = load_model(skeleton.folder, task=recipe.task, dtype=torch.float32).requires_grad_(requires_grad=False)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for block in blocks:
            entries = read_entries(work.result / block["file"])
            for layer in block["layers"]:
                value = read_tensor(entries[skeleton.written_name(layer["name"])])
                model.get_parameter(layer["name"]).copy_(value)
    with evaluating(model), evaluating(dense):
        losses = distil(
            model,
            dense,
            blocks,
            _needed(job.windows, recipe),
            recipe,
            stored=skeleton.stored_type,
            low_precision=work.journal.settings["bfloat16"],
            progress=tuning,
        )
    work.tuned.mkdir(exist_ok=True)
    for block in blocks:
        parts: dict[str, Any] = dict(read_entries(work.result / block["file"]))
        for layer in block["layers"]:
            name = layer["name"]
            value = model.get_parameter(name).detach().to(skeleton.stored_type(name))
            parts[skeleton.written_name(name)] = value
        block["sha256"] = write_shard(work.tuned / block["file"], parts, work.folder)
    work.journal.distilled = list(losses)
    work.commit()
    work.promote()


# -- both -------------------------------------------------------------------------------------------------------------


def _plan_memory(
    layout: Layout, model: Any, paths: Sequence[str], outside: int, windows: torch.Tensor | None, recipe: Recipe
) -> MemoryPlan:
    """The memory of all stages of a run; PlanError when one does not fit, or lacks text.

    outside: the most of `bytes_outside`.
    """
    if recipe.readers:
        _needed(windows, recipe)
    count, context = (0, 1) if windows is None else windows.shape
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
    walk = choose(layout, paths, outside, count, context, recipe.memory, dense=tuned, tuned=tuned)
    batch = min(walk.batch, recipe.reconstruct.windows) if recipe.reconstruct else walk.batch
    return MemoryPlan(batch, walk.on_disk, max([walk.expected, *peaks]))


def bytes_outside(skeleton: Skeleton, paths: Sequence[str]) -> list[int]:
    """Bytes, in the type of computation, of each tensor outside the blocks; the largest are usually the embeddings."""
    inside = {name for path in paths for name in skeleton.names_under(path)}
    return [
        4 * (e.bytes // (2 if e.dtype in ("BF16", "F16") else 4))
        for n, e in skeleton.entries.items()
        if n not in inside
    ]


def _batches(model: Any, windows: torch.Tensor | None, size: int) -> list[dict[str, Any]]:
    return [] if windows is None else batches_of(model, windows, size)


def _needed(windows: torch.Tensor | None, recipe: Recipe) -> torch.Tensor:
    """The windows of calibration text; PlanError, with what of the recipe reads them, when there are none."""
    if windows is None:
        raise PlanError(f"{recipe.readers[0]} needs calibration text; pass --calibration FILE")
    return windows
