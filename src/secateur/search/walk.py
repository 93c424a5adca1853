"""automatic: from a target to a smaller model that was measured, or to a sentence that says what can be reached."""

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.deploy.gguf.export import PACKAGES, check_gguf
from secateur.deploy.jobs.export import distributions, tokenizer_of
from secateur.deploy.jobs.timing import Say
from secateur.deploy.target import GGUF, TARGETS
from secateur.deploy.target import find as target_of
from secateur.errors import PlanError, TargetError
from secateur.files import check_output, new_folder, write_json
from secateur.record import write_record
from secateur.records.model import model_type_of
from secateur.records.provenance import provenance_of
from secateur.search.choosing.choice import bounded
from secateur.search.choosing.chooser import Settings
from secateur.search.costs import Cost
from secateur.search.points import Found, Origin, Point, permitted, quality
from secateur.search.readers import check_reader
from secateur.search.records import record_of
from secateur.search.rows import Rows
from secateur.search.sparse.stage import MixedStages
from secateur.search.stages import MISSED, Stages, quantity_of, reached
from secateur.search.target import LLAMA_CPP, Call, Target, calls_of
from secateur.tasks.base.evaluate import Track, silent
from secateur.tasks.base.task import Task
from secateur.torch.files.hashes import write_hashes
from secateur.torch.host import TorchHost

LADDER = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
"""Speed-ups, or how many times smaller, that are tried one after the other where only a drop is asked for."""
STEPS_BACK = (0.75, 0.5, 0.25)
"""Parts of the asked saving that are tried where the whole loses too much, to say what can be reached."""
RESULT = "secateur-search.json"


def automatic(
    host: TorchHost,
    task: Task,
    target: Target,
    rows: Rows,
    output: Path | str | None = None,
    *,
    frontier: Sequence[float] = (),
    heal_seconds: float = 1800.0,
    search_seconds: float = 60.0,
    seed: int = 0,
    work: Path | str | None = None,
    overwrite: bool = False,
    save_options: Mapping[str, Any] | None = None,
    track: Track = silent,
    say: Say = lambda text: None,
    stage: Say = lambda name: None,
    best: Say = lambda text: None,
) -> Found:
    """Prune a model until it is as fast or small as the target says, with the least loss of quality, and measure both.

    host: the dense model, which stays as it is.
    rows: calibration, search and test rows, which share no row.
    output: folder to write the result to, with the artefact of each runtime inside; None to write nothing.
    frontier: speed-ups on the target's call to reach one after the other instead; each becomes a folder in `output`.
    heal_seconds: the most that training with the dense model as teacher takes, for each model; 0 for none.
    search_seconds: the most that the local search on true divergence takes.
    work: folder that keeps finished stages, so that a killed run goes on; a temporary one when left out.
    track, say, stage, best: show bars, sentences, the names of stages, and the best candidate so far.

    Where the target is missed nothing is written, unless the target asks for the `closest`.

    Raises PlanError for a target that no choice of sizes reaches, VerifyError and ModelError as `secateur.verify` and
    reloading do, DeployError for a runtime that is not there.
    """
    began = time.perf_counter()
    settings = Settings(heal_seconds, search_seconds, seed, dict(save_options or {}))
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    if frontier and target.call is None:
        raise TargetError("a frontier is measured on a runtime; name one (--on)")
    if frontier and target.zeros:
        raise TargetError("zeros are chosen for one latency, not along a frontier; leave out --zeros or --frontier")
    check_calls(host, target)
    with _working(work) as place:
        make = MixedStages if target.zeros else Stages
        stages = make(host, task, target, rows, place, settings, track=track, say=say, stage=stage, best=best)
        if frontier:
            found = along(stages, frontier)
        elif target.limits:
            found = within_limits(stages)
        else:
            found = fastest(stages)
        seconds = time.perf_counter() - began
        origin = Origin(
            stages.test.evaluation(),
            model_type_of(host.model),
            stages.costs,
            provenance_of(seconds=seconds, seed=seed, data=rows.files, packages=packages_of(stages.calls)),
        )
        found = replace(found, seconds=dict(stages.seconds), origin=origin)
        if output is not None and found.best is not None and (found.is_met or target.closest):
            found = write(found, Path(output), overwrite=overwrite)
        return found


def check_calls(host: TorchHost, target: Target) -> None:
    """DeployError for a model that llama.cpp does not have where the target is timed there, and for one that the
    server does not read which the target names: before statistics are made, which take long."""
    check_reader(host.model, target.reader)
    lengths = [call.length for call in calls_of(target) if call.runtime == GGUF]
    for length in lengths or ([1] if target.reader == LLAMA_CPP else []):
        check_gguf(host.model, None if host.source is None else tokenizer_of(host.source), length)


@contextmanager
def _working(work: Path | str | None) -> Iterator[Path]:
    if work is not None:
        Path(work).mkdir(parents=True, exist_ok=True)
        yield Path(work)
        return
    with tempfile.TemporaryDirectory(prefix="secateur-search-") as temporary:
        yield Path(temporary)


# -- what can be asked ------------------------------------------------------------------------------------------------


def within_limits(stages: Stages) -> Found:
    """The best model within all limits; with a permitted drop, models of less saving too where it loses too much."""
    target, costs = stages.target, stages.costs
    point = stages.point("asked", costs, stages.settings.heal_seconds)
    points = [point]
    misses = missed(stages, point)
    if not misses:
        return Found(target, points, point, reading(target, point), is_met=True)
    if permitted(target, point):
        return Found(target, points, point, f"{'; '.join(misses)}; nothing nearer was found")
    for part in STEPS_BACK:
        easier = [bounded(cost, 1 - part * (1 - cost.bound)) for cost in costs]
        points.append(stages.point(f"part-{part:g}", easier, stages.settings.heal_seconds))
        if permitted(target, points[-1]):
            break
    return Found(target, points, point, _reachable(target, misses, points))


def fastest(stages: Stages) -> Found:
    """The fastest model (or the smallest, where no runtime is named) whose drop is permitted.

    The search rows say where on the `LADDER` to begin; then models are healed and measured, one step up after a model
    that loses little enough, one step down after another, and the test rows have the last word.
    """
    target = stages.target
    points: dict[int, Point | None] = {}
    index = max(0, _steps_without_healing(stages))
    while 0 <= index < len(LADDER) and index not in points:
        point = points[index] = _at(stages, LADDER[index])
        index += 1 if point is not None and permitted(target, point) else -1
    made = [point for _, point in sorted(points.items()) if point is not None]
    good = [point for point in made if permitted(target, point)]
    if good:
        return Found(target, made, good[-1], reading(target, good[-1]), is_met=True)
    lost = f"; the nearest, {made[0].name}, loses {quality(target, made[0])}" if made else ""
    wanted = f"{target.max_drop:g} {'divergence' if target.by_divergence else 'of the main metric'}"
    return Found(target, made, made[0] if made else None, f"no model loses at most {wanted}{lost}")


def packages_of(calls: Iterable[Call]) -> list[str]:
    """The installed distributions of the runtimes that are timed."""
    names: list[str] = []
    for call in calls:
        names += PACKAGES if call.runtime == GGUF else []
        names += distributions(target_of(call.runtime)) if call.runtime in TARGETS else []
    return names


def _at(stages: Stages, times: float) -> Point | None:
    """The model that is so many times faster or smaller; None where no choice of sizes is."""
    try:
        return stages.point(f"{times:g}x", _limits_at(stages, times), stages.settings.heal_seconds)
    except PlanError:
        return None


def _limits_at(stages: Stages, times: float) -> list[Cost]:
    return [bounded(cost, 1 / times) for cost in stages.costs]


def _steps_without_healing(stages: Stages) -> int:
    """How far on the ladder the search rows permit to go without healing; -1 for nowhere."""
    for step, times in enumerate(LADDER):
        try:
            chosen = stages.chosen(_limits_at(stages, times))
        except PlanError:
            return step - 1
        if stages.lost(chosen) > (stages.target.max_drop or 0.0):
            return step - 1
    return len(LADDER) - 1


def along(stages: Stages, speeds: Sequence[float]) -> Found:
    """A model for each speed-up, and one pruned uniformly beside it."""
    target = stages.target
    costs = [cost for cost in stages.costs if cost.limit.call == target.call and cost.limit.quantity == "latency"][:1]
    points, baselines = [], []
    for speed in sorted(speeds):
        bound = [bounded(costs[0], 1 / speed)]
        try:
            points.append(stages.point(f"{speed:g}x", bound, stages.settings.heal_seconds))
        except PlanError as error:
            if speed == min(speeds):
                raise
            stages.say(f"{speed:g}x and faster are left out: {error}")
            break
        baselines.append(stages.uniform(f"uniform-{speed:g}x", bound))
    good = [point for point in points if permitted(target, point)]
    best = max(good, key=lambda point: point.speed_up or 0.0, default=None)
    words = "; ".join(f"{p.name}: {p.speed_up:.2f}x, {quality(target, p)}" for p in points)
    return Found(target, points, best or points[0], words, is_met=best is not None, baselines=baselines)


# -- whether it holds, and how that reads -----------------------------------------------------------------------------


def missed(stages: Stages, point: Point) -> list[str]:
    """For each limit that a model misses as it was measured, and for the quality, a part of a sentence."""
    misses = []
    for cost in stages.costs:
        ratio = reached(cost, point.candidate, point.measured)
        if ratio > 1 + (MISSED if cost.limit.call is not None else 1e-9):
            misses.append(f"{quantity_of(cost)} is {ratio:.3f} times what is permitted")
    if not permitted(stages.target, point):
        misses.append(f"the model loses {quality(stages.target, point)}")
    return misses


def speeds(point: Point) -> str:
    """How fast a model is on each runtime, for a person; how small where none was named."""
    if not point.measured:
        return f"{point.parameters[0] / point.parameters[1]:.1%} of the parameters"
    return ", ".join(
        f"{m.speed_up:.2f} times as fast on {m.runtime} ({m.ms:.2f} ms, dense {m.dense_ms:.2f} ms)"
        for m in point.measured.values()
    )


def reading(target: Target, point: Point) -> str:
    """The result in a sentence."""
    return f"{speeds(point)}, with a drop of {quality(target, point)}"


def _reachable(target: Target, misses: Sequence[str], points: Sequence[Point]) -> str:
    """Why a target is missed, and what can be reached."""
    last = points[-1]
    if permitted(target, last):
        return f"{'; '.join(misses)}; within reach is {reading(target, last)}"
    return f"{'; '.join(misses)}; even {reading(target, last)} is more than is permitted"


# -- files ------------------------------------------------------------------------------------------------------------


def write(found: Found, output: Path, *, overwrite: bool) -> Found:
    """Write the result: the model's folder with the artefacts, its record and `secateur-search.json`; a folder for each
    model of a frontier.
    """
    assert found.best is not None
    many = bool(found.baselines)
    with new_folder(output, overwrite=overwrite) as temporary:
        for point in found.points if many else [found.best]:
            folder = temporary / point.name if many else temporary
            _write_point(point, folder)
            write_record(record_of(found, point, title=point.name if many else output.name), folder)
            if many:
                write_hashes(folder)
        found = replace(found, folder=output)
        write_json(temporary / RESULT, found.as_json())
        if not many:
            write_hashes(temporary)
    return found


def _write_point(point: Point, folder: Path) -> None:
    """A model as it was measured: its folder, and the artefact of each runtime inside under the runtime's name."""
    shutil.copytree(point.folder, folder, dirs_exist_ok=True)
    for times in point.measured.values():
        if times.runtime in (*TARGETS, GGUF):  # others run the folder itself
            shutil.copytree(times.artefact, folder / times.runtime, dirs_exist_ok=True)
