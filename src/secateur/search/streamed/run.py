"""Pruning of whole units block by block: record the dense model, order the units of each block, choose, cut, write.

The walk forward keeps the outputs of all blocks on disk, and the walk backward the gradients at them; on the way back
each block gives the order and the curve of its axes. The sizes are then chosen by a cost that is counted, and a last
walk refits, cuts and writes one block after the other. One block is in memory at a time. A run that is killed goes on
with the first block that is not finished.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ModelError, PlanError, SecateurError, TargetError
from secateur.layout import Layout
from secateur.plan import Plan
from secateur.repair.removable import Removable
from secateur.search.build import RIDGES, plan_of
from secateur.search.candidate import Candidate
from secateur.search.choosing.choice import choose
from secateur.search.costs import costs_of
from secateur.search.levels import METHODS, AxisLevels, Levels
from secateur.search.stored import LEVELS, load, save
from secateur.search.streamed.block_levels import axes_by_block, block_levels, curvature_of, joined
from secateur.search.streamed.memory import UnitsPlan, plan_memory
from secateur.search.streamed.result import ChosenUnits, UnitsReport, finish, place_of
from secateur.search.target import TIMED, Target
from secateur.stats import Stats
from secateur.tasks.base.task import Task
from secateur.tasks.find import task_of_config
from secateur.tasks.text_generation import TextGeneration
from secateur.torch.base.manifest import select
from secateur.torch.blockwise.block_calls import chains
from secateur.torch.blockwise.block_states import States
from secateur.torch.blockwise.recorded import GRADIENT, OUTPUT, Recorded
from secateur.torch.data.example import example_for
from secateur.torch.data.token_windows import batches_of
from secateur.torch.files.safetensors_header import TYPES
from secateur.torch.files.safetensors_shards import write_shard
from secateur.torch.host import TorchHost
from secateur.torch.stream.journal import Workspace, workspace
from secateur.torch.stream.lazy_model import Skeleton
from secateur.torch.stream.memory_plan import give_back
from secateur.torch.stream.run import bytes_outside, check_written, identity_of
from secateur.torch.stream.run_result import shard_name

METHOD, RIDGE = METHODS[0], RIDGES[-1]
"""How units are ordered, and the ridge of the refit. The search in memory tries several of both on the whole model;
this ridge was best on a small language model."""
Progress = Callable[[str, int, int], None]
"""Gets the name of a walk, and how many of how many blocks are done."""


def prune_units(
    source: Path,
    output: Path,
    windows: torch.Tensor,
    target: Target,
    *,
    memory: int | None = None,
    seed: int = 0,
    calibration: Sequence[Path] = (),
    overwrite: bool = False,
    began: Callable[[UnitsPlan, int], None] = lambda plan, resumed: None,
    progress: Progress = lambda walk, step, steps: None,
) -> UnitsReport:
    """Prune a Hugging Face folder of a decoder into another whose counted cost is within the limits of a target.

    windows: token ids (windows, context) of calibration text. target: its limits are on params, macs or bytes.
    memory: the most bytes to take; None for no limit. seed: of the draws of labels. calibration: where the text comes
    from, for the record. began: gets the plan of the memory, and how many blocks were finished before.
    progress: shows how far each walk is.

    Raises TargetError for a target that cannot be checked without the whole model, PlanError for sizes that cannot be
    reached and for too little memory or disk, ModelError for other models than decoders, SecateurError when `output`
    exists or belongs to a run with other settings.
    """
    check_target(target)
    if Path(source).resolve() == Path(output).resolve():
        raise SecateurError(f"{output} is the model itself, which is read to the end; choose another output")
    skeleton = Skeleton(Path(source))
    task = _task_of(skeleton)
    twin = skeleton.twin(has_caches=True)  # without them, Llama asks for values that the meta device does not have
    small = TorchHost(twin, example_for(twin))
    layout = small.layout
    paths = _only_chain(layout)
    skeleton.check(paths)
    blocks, notes = axes_by_block(layout, paths, lambda name: skeleton.source(name) is not None)
    costs = costs_of(target, small, widths=_widths(skeleton, layout))
    choose(_any_levels(layout, blocks), costs)  # sizes that cannot be reached are refused before the walks
    asked = {"target": repr(target), "seed": seed, "method": METHOD, "ridge": RIDGE}
    with workspace(Path(output), identity_of(skeleton, windows, asked), overwrite=overwrite) as work:
        batches = batches_of(skeleton.model, windows, 1)
        recorded = Recorded(skeleton.model, paths, batches, States(work.folder / "states"))
        host = TorchHost(skeleton.model, None, layout=layout)
        job = _Job(work, skeleton, host, task, recorded, blocks, seed, progress)
        resumed = len(work.journal.blocks)
        if not work.journal.finished:
            _begin(job, windows, memory, lambda plan: began(plan, resumed))
        with skeleton.filled_on_demand(paths), torch.no_grad():
            levels = joined(_levels(job), notes)
            candidate = choose(levels, costs)
            plan = _cut(job, levels, candidate)
        small.resize(plan)
        chosen = ChosenUnits(layout, plan, levels, candidate, costs)
        return finish(work, skeleton, small, chosen, calibration=calibration, seed=seed, resumed=resumed)


def check_target(target: Target) -> None:
    """TargetError unless the limits can be counted from shapes, and nothing is asked that the whole model tells."""
    timed = next((limit.quantity for limit in target.limits if limit.quantity in TIMED), None)
    if timed is not None or target.call is not None:
        raise TargetError(
            f"a {timed or 'speed'} is measured on whole models, which --memory rules out; limit params, macs or bytes "
            "(--target 'params<=0.75'), or leave --memory out"
        )
    if target.max_drop is not None:
        raise TargetError(
            "a drop is measured on whole models, which --memory rules out; leave it out and compare afterwards with "
            "secateur eval --against, or leave --memory out"
        )
    if not target.limits:
        raise TargetError("no size is limited; add --target 'params<=0.75'")


@dataclass(frozen=True)
class _Job:
    """What all walks read. host: of the model that the skeleton fills. blocks: path -> the axes searched in it."""

    work: Workspace
    skeleton: Skeleton
    host: TorchHost
    task: Task
    recorded: Recorded
    blocks: Mapping[str, Sequence[Removable]]
    seed: int
    progress: Progress

    @property
    def paths(self) -> Sequence[str]:
        return self.recorded.paths

    def commit(self, began: float) -> None:
        """Write the journal, with the states that are there and the seconds since `began`."""
        journal = self.work.journal
        journal.states = self.recorded.states.record()
        journal.settings["seconds"] = (journal.settings.get("seconds") or 0.0) + time.perf_counter() - began
        self.work.commit()


def _task_of(skeleton: Skeleton) -> Task:
    """The task of a decoder; ModelError for any other model."""
    kind = task_of_config(skeleton.config)
    if kind is not TextGeneration or getattr(skeleton.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{skeleton.folder} is no decoder with next-token logits ({type(skeleton.model).__name__}), and only their "
            "units are pruned block by block; leave --memory out"
        )
    return TextGeneration(skeleton.model, None)


def _only_chain(layout: Layout) -> list[str]:
    """The blocks of a model that has one chain of them; ModelError for others."""
    found = chains(layout)
    if len(found) > 1:
        raise ModelError(
            f"the model has several chains of layers ({', '.join(found)}), and units of one chain only are pruned "
            "block by block; leave --memory out"
        )
    return next(iter(found.values()))


def _widths(skeleton: Skeleton, layout: Layout) -> dict[str, int]:
    """Parameter -> bytes of one of its numbers in the files."""
    names = {
        **{name: name for name in layout.params},
        **{b: a for a, b in layout.tied.items() if a in skeleton.sources},
    }
    found = {}
    for name, source in names.items():
        entry = next((skeleton.entries[file] for file in skeleton.sources.get(source, ())), None)
        found[name] = 4 if entry is None or entry.dtype not in TYPES else TYPES[entry.dtype].itemsize
    return found


def _any_levels(layout: Layout, blocks: Mapping[str, Sequence[Removable]]) -> Levels:
    """Levels of all axes that are searched, in which every unit costs the same."""
    axes = [layout.axis(found.axis) for inside in blocks.values() for found in inside]
    return Levels(
        METHOD,
        {a.name: AxisLevels(a.name, a.kind, np.arange(a.size), np.arange(a.size + 1.0)) for a in axes},
    )


def _begin(job: _Job, windows: torch.Tensor, memory: int | None, began: Callable[[UnitsPlan], None]) -> None:
    """Plan memory and disk, or take over what an interrupted run has planned and kept."""
    work, settings = job.work, job.work.journal.settings
    plan = plan_memory(
        job.host.layout,
        job.skeleton.model,
        job.blocks,
        bytes_outside(job.skeleton, job.paths),
        (len(windows), windows.shape[1]),
        memory,
    )
    if settings:
        torch.set_num_threads(settings["threads"])
        job.recorded.states.restore(work.journal.states)
        check_written(work)
    else:
        free = shutil.disk_usage(work.folder).free
        if plan.disk > free:
            raise PlanError(
                f"the states of all blocks take {plan.disk / 2**30:.1f} GiB on the disk of {work.output.parent}, which "
                f"has {free / 2**30:.1f} GiB; make room, or use fewer --samples or a shorter --context"
            )
        settings.update(batch=1, on_disk=True, expected=plan.expected, threads=torch.get_num_threads(), bfloat16=False)
    began(plan)


# -- the walks --------------------------------------------------------------------------------------------------------


def _levels(job: _Job) -> list[Levels]:
    """The levels of each block. Where blocks are still to be cut, the states of the dense model are on disk then."""
    if job.work.journal.finished:
        return [load(place_of(job.work))]
    folders = [job.work.folder / "levels" / f"{number:05d}" for number in range(len(job.paths))]
    if len(job.work.journal.blocks) < len(job.paths):
        _forward(job)
        _backward(job, folders)
    return [load(folder) for folder in folders]


def _forward(job: _Job) -> None:
    """Keep the outputs of all blocks, and the gradient of the task's score at the last."""
    recorded, last = job.recorded, len(job.paths) - 1
    for block, path in enumerate(job.paths):
        began = time.perf_counter()
        if not recorded.has(OUTPUT, block):
            job.skeleton.load(path)
            recorded.forward(block)
            job.skeleton.release(path)
            job.commit(began)
            give_back()
        job.progress("dense outputs", block + 1, len(job.paths))
    began = time.perf_counter()
    if not recorded.has(GRADIENT, last):
        recorded.score(job.task.fisher_loss, job.seed)
        job.skeleton.release("")  # the output layer, which nothing reads any more
        give_back()
        job.commit(began)


def _backward(job: _Job, folders: Sequence[Path]) -> None:
    """Keep the gradients at the outputs of all blocks, and write the levels of each block."""
    recorded, total = job.recorded, len(job.paths)
    for block in reversed(range(total)):
        began, path, folder = time.perf_counter(), job.paths[block], folders[block]
        axes = job.blocks[path]
        if not ((folder / LEVELS).is_file() and (block == 0 or recorded.has(GRADIENT, block - 1))):
            job.skeleton.load(path)
            stats = curvature_of(job.host, recorded, job.task, block, axes, keep=True)
            give_back()
            found = block_levels(job.host, stats, axes, METHOD)
            del stats
            job.skeleton.release(path)
            folder.mkdir(parents=True, exist_ok=True)
            save(found, folder)
            job.commit(began)
            give_back()
        job.progress("curvature", total - block, total)


def _cut(job: _Job, levels: Levels, candidate: Candidate) -> Plan:
    """Refit, cut and write the blocks that are not finished. Returns the plan of the whole model, without weights."""
    journal, total = job.work.journal, len(job.paths)
    for block in range(len(journal.blocks), total):
        began, path = time.perf_counter(), job.paths[block]
        parts: dict[str, Any] = {name: job.skeleton.entries[name] for name in job.skeleton.names_under(path)}
        kept = {a.axis: candidate.kept[a.axis] for a in job.blocks[path] if a.axis in candidate.kept}
        if kept:
            job.skeleton.load(path)
            cut = _smaller(job, levels, block, Candidate(kept))
            parts |= {
                job.skeleton.written_name(name): value.to(job.skeleton.stored_type(name)) for name, value in cut.items()
            }
            job.skeleton.release(path)
            del cut
        file = shard_name(block + 1, total)
        digest = write_shard(job.work.result / file, parts, job.work.folder)
        shapes = {name: part.shape for name, part in parts.items()}
        seconds = time.perf_counter() - began
        layers = [_layer(name, shapes) for name in sorted(shapes) if kept and isinstance(parts[name], torch.Tensor)]
        entry = {"path": path, "file": file, "error": None, "tuned": None, "layers": layers}
        journal.blocks.append({**entry, "sha256": digest, "seconds": seconds})
        job.work.commit()
        del parts
        give_back()
        job.progress("block", block + 1, total)
    units = {name: levels.axes[name].kept(count) for name, count in candidate.kept.items()}
    return Plan(units, provenance={"method": METHOD, "ridge": RIDGE, "pattern": "unit"}).check(job.host.layout)


def _layer(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The journal's entry of a tensor that became smaller."""
    return {"name": name, "weights": torch.Size(shapes[name]).numel(), "zeros": 0, "error": None, "notes": []}


def _smaller(job: _Job, levels: Levels, block: int, candidate: Candidate) -> dict[str, torch.Tensor]:
    """The tensors of a block, which is in memory, that become smaller, by parameter."""
    layout, path = job.host.layout, job.paths[block]
    refitted = [a for a in job.blocks[path] if a.axis in candidate.kept and levels.axes[a.axis].weight is not None]
    stats = curvature_of(job.host, job.recorded, job.task, block, refitted, keep=False) if refitted else Stats()
    give_back()
    plan = plan_of(job.host, levels, stats, candidate, RIDGE)
    tensors = {}
    for name in (param for param in layout.params if param.startswith(f"{path}.")):
        positions = layout.kept(name, plan.keep)
        assert positions is not None  # no layer goes
        if name in job.skeleton.sources and (name in plan.weights or any(kept is not None for kept in positions)):
            value = torch.from_numpy(plan.weights[name]) if name in plan.weights else job.host.read(name)
            tensors[name] = select(value, [None if kept is None else kept.nonzero()[0].tolist() for kept in positions])
    return tensors
