"""One-shot pruning block by block: read a block, run the calibration states through it, prune it, write it, go on.

The states that a block sees come from the pruned blocks before it. `prune_folder` holds one block in memory and can be
killed at any moment; `prune_loaded` does the same to a model in memory, by the same code and to the same bits.
"""

import contextlib
import copy
import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._version import __version__
from secateur.errors import ModelError, PlanError
from secateur.files import write_json
from secateur.layout import Layout
from secateur.recipe import Recipe
from secateur.torch.allocate import by_outliers
from secateur.torch.batches import evaluating
from secateur.torch.blocks import counted, left_out
from secateur.torch.blockwise import Done, Run
from secateur.torch.calls import chains
from secateur.torch.headers import TYPES, read_entries
from secateur.torch.hub import INDEX
from secateur.torch.journal import Workspace, workspace
from secateur.torch.memory import Choice, choose, give_back
from secateur.torch.precision import computing_in, fast_bfloat16
from secateur.torch.retrain import check_memory, distil
from secateur.torch.sensitivity import by_sensitivity, check_room
from secateur.torch.shards import file_hash, read_tensor, write_shard
from secateur.torch.skeleton import COMPUTE, Skeleton
from secateur.torch.states import States
from secateur.torch.trace import trace
from secateur.torch.windows import batches_of, windows_hash

RECORD = "pruned.json"


@dataclass(frozen=True)
class Report:
    """What a run did. left_out: linear weights of the layers that it does not prune. distilled: mean loss of the first
    and the last pass of distillation, where that was asked for; the errors of the layers are those before it.
    """

    folder: str | None
    blocks: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]
    resumed: int = 0
    distilled: tuple[float, float] | None = None

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Every pruned weight: name, weights, zeros, error, notes."""
        return [layer for block in self.blocks for layer in block["layers"]]

    @property
    def weights(self) -> int:
        """The denominator of the sparsity."""
        return sum(layer["weights"] for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Weights that are zero."""
        return sum(layer["zeros"] for layer in self.layers)


Progress = Callable[[Done], None]
Tuning = Callable[[int, int, float], None]
"""Told step, steps and loss."""


def prune_loaded(
    model: nn.Module,
    windows: torch.Tensor | None,
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    tuning: Tuning | None = None,
) -> Report:
    """Prune a Hugging Face model in memory, block by block, in place. It computes in float32, whatever it is stored as.

    windows: token ids (windows, context) to calibrate on; None where the recipe reads no text (`Recipe.reads_text`).
    progress: told of each block; tuning: of each step of distillation.
    Raises PlanError for a pattern that does not fit, ModelError for a model without a chain of layers, or in float64.
    """
    from secateur.torch.example import example_for

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
            records.append(_record(done, ""))
            if progress:
                progress(done)
        distilled = None
        if recipe.distil:
            assert windows is not None
            distilled = distil(model, dense, records, windows, recipe, dtypes.__getitem__, fast_bfloat16(), tuning)
    return Report(None, tuple(records), tuple(left_out(layout, model, paths)), distilled=distilled)


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
    began: Callable[[Choice, int], None] | None = None,
    tuning: Tuning | None = None,
) -> Report:
    """Prune a Hugging Face folder into another, one block in memory at a time; a killed run is taken up where it was.

    windows, progress, tuning: as in `prune_loaded`. began: told the choice of memory and how many blocks
    were done before.

    Raises SecateurError when `output` exists or belongs to a run with other settings; ModelError for damaged folders.
    """
    skeleton = Skeleton(Path(source), recipe.task)
    layout = skeleton.layout()
    model = skeleton.model
    paths = [p for c in chains(layout).values() for p in c]
    identity = _identity(skeleton, windows, recipe)
    with workspace(Path(output), identity, overwrite) as work:
        if work.journal.finished:
            report = _finish(work, layout, skeleton, paths, len(work.journal.blocks))
            return report
        settings = work.journal.settings
        if not work.resumed or not settings:
            choice = _chosen(layout, model, paths, _outside(skeleton, paths), windows, recipe)
            settings.update(asdict(choice), threads=torch.get_num_threads(), bfloat16=fast_bfloat16())
            work.commit()
        else:
            torch.set_num_threads(settings["threads"])
        states = States(work.folder / "states" if settings["on_disk"] else None)
        batches = _batches(model, windows, settings["batch"])
        run = Run(model, layout, batches if recipe.walks else [], recipe, states, settings["bfloat16"])
        with skeleton.filled_on_demand(paths), torch.no_grad(), _old_objects_frozen():
            if recipe.owl or recipe.sensitivity:
                if "sparsity" not in settings:
                    if recipe.owl:
                        place = work.folder / "survey" if settings["on_disk"] else None
                        walk = Run(model, layout, batches, recipe, States(place))
                        settings["sparsity"] = _allocated(walk, skeleton.load, skeleton.release)
                    else:
                        settings["sparsity"] = _by_sensitivity(skeleton, layout, windows, recipe)
                    work.commit()
                run.shares = settings["sparsity"]
            resumed = _catch_up(run, work, skeleton)
            if began:
                began(Choice(settings["batch"], settings["on_disk"], settings["expected"]), resumed)
            while len(run.finished) < run.total:
                done = _one_block(run, work, skeleton)
                if progress:
                    progress(done)
        if recipe.distil and work.journal.distilled is None:
            del states, run, batches
            _distil_folder(work, skeleton, windows, recipe, tuning)
        return _finish(work, layout, skeleton, paths, resumed)


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
    file = f"model-{done.number:05d}-of-{run.total + 1:05d}.safetensors"
    digest = write_shard(work.result / file, parts, work.folder)
    if run.batches and done.number < run.total:
        run.advance("pruned", skeleton.model.get_submodule(path))
    record = _record(done, file)
    work.journal.blocks.append({**record, "sha256": digest, "seconds": done.seconds})
    work.journal.states = run.states.record(run.stale(path))
    work.commit()
    run.close(path)
    skeleton.release(path)
    give_back()
    return done


def _nothing(path: str) -> None:
    """A model in memory has its blocks."""


def _allocated(walk: Run, load: Callable[[str], None], release: Callable[[str], None]) -> dict[str, float]:
    walk.dense = False
    assert walk.recipe.owl is not None
    assert walk.recipe.sparsity is not None
    return by_outliers(walk, walk.recipe.owl, walk.recipe.sparsity, load, release)


def _by_sensitivity(
    skeleton: Skeleton, layout: Layout, windows: torch.Tensor | None, recipe: Recipe
) -> dict[str, float]:
    from secateur.torch.open import load_model

    assert windows is not None
    model = load_model(skeleton.folder, task=recipe.task, dtype=COMPUTE).requires_grad_(False)
    with evaluating(model):
        return by_sensitivity(model, layout, windows, recipe)


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


def _record(done: Done, file: str) -> dict[str, Any]:
    return {
        "path": done.path,
        "file": file,
        "error": done.error,
        "tuned": list(done.tuned) if done.tuned else None,
        "layers": [{**asdict(layer), "notes": list(layer.notes)} for layer in done.layers],
    }


def _catch_up(run: Run, work: Workspace, skeleton: Skeleton) -> int:
    """Take up the states of an interrupted run, from disk where they are whole, else by running the finished blocks."""
    blocks = work.journal.blocks
    for block in blocks:
        file = work.result / block["file"]
        if not file.is_file() or file_hash(file) != block["sha256"]:
            raise ModelError(f"{file} is not what the run wrote; delete {work.folder} to start over")
    if len(blocks) == run.total or run.states.restore(work.journal.states):
        run.finished = [block["path"] for block in blocks]
        return len(blocks)
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
    return len(blocks)


def _finish(work: Workspace, layout: Layout, skeleton: Skeleton, paths: Sequence[str], resumed: int) -> Report:
    """Write what belongs to no block, the index, the config and the record; then give the folder its name."""
    blocks = work.journal.blocks
    report = Report(
        str(work.output),
        tuple({k: v for k, v in block.items() if k not in ("sha256", "seconds")} for block in blocks),
        tuple(left_out(layout, skeleton.model, paths)),
        resumed,
        (work.journal.distilled[0], work.journal.distilled[1]) if work.journal.distilled else None,
    )
    if not work.journal.finished:
        inside = {name for path in paths for name in skeleton.names_under(path)}
        rest = {name: entry for name, entry in skeleton.entries.items() if name not in inside}
        file = f"model-{len(blocks) + 1:05d}-of-{len(blocks) + 1:05d}.safetensors"
        write_shard(work.result / file, rest, work.folder)
        index = dict.fromkeys(rest, file)
        for block in blocks:
            index |= dict.fromkeys(read_entries(work.result / block["file"]), block["file"])
        size = sum(entry.bytes for entry in skeleton.entries.values())
        write_json(work.result / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
        _copy_others(skeleton.folder, work.result)
        write_json(
            work.result / RECORD,
            {
                "recipe": work.journal.identity["recipe"],
                "secateur": __version__,
                "counted": {"tensors": len(report.layers), "weights": report.weights, "zeros": report.zeros},
                "left_out": list(report.left_out),
                "distilled": work.journal.distilled,
                "blocks": list(report.blocks),
            },
        )
    work.finish()
    return report


def _copy_others(source: Path, folder: Path) -> None:
    """Config, tokenizer and whatever else is no weight file."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in weights and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)


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
) -> Choice:
    count, context = (0, 1) if windows is None else windows.shape
    if windows is None and recipe.reads_text:
        raise PlanError(f"{recipe.criterion} needs calibration text; pass --calibration FILE")
    if recipe.sensitivity:
        check_room(model, windows, recipe.memory)
    if recipe.distil:
        trained = [name for path in paths for name in counted(layout, model, path)]
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
        check_memory(model, trained, recipe.distil.windows * context, vocabulary, recipe.memory)
    if not (recipe.walks or recipe.owl):
        count, context = 0, 1
    tuned = recipe.reconstruct is not None
    found = choose(layout, paths, outside, count, context, recipe.memory, dense=tuned, tuned=tuned)
    if recipe.reconstruct:
        return Choice(min(found.batch, recipe.reconstruct.windows), found.on_disk, found.expected)
    return found


def _outside(skeleton: Skeleton, paths: Sequence[str]) -> int:
    """Bytes, in the type of computation, of the largest parameter outside the blocks: the embeddings as a rule."""
    inside = {name for path in paths for name in skeleton.names_under(path)}
    sizes = [
        e.bytes // (2 if e.dtype in ("BF16", "F16") else 4) for n, e in skeleton.entries.items() if n not in inside
    ]
    return 4 * max(sizes, default=0)


def _batches(model: Any, windows: torch.Tensor | None, size: int) -> list[dict[str, Any]]:
    return [] if windows is None else batches_of(model, windows, size)
