"""The demo: one dense model made faster in each way that there is, and everything measured beside it.

A search for a speed-up, zeros on kernels that leave them out, heads and neurons by hand, and fewer tokens of a text.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur import criteria
from secateur.budget import Global, Uniform
from secateur.data.table import Table
from secateur.deploy import runner
from secateur.deploy.jobs.bench import OURS, artefact, bench, installed
from secateur.deploy.jobs.export import export
from secateur.deploy.jobs.results import Bench, Timing
from secateur.deploy.jobs.timing import Shape, in_turn
from secateur.deploy.target import TARGETS, find
from secateur.files import new_folder
from secateur.jobs import schedule_tokens
from secateur.jobs.demo import BATCH, Settings, demo_rows, dense_model, described, options_of, slug, write_rows
from secateur.jobs.demo_results import (
    TOKENS,
    FewerTokens,
    Line,
    Shown,
    dense_line,
    outcome_line,
    point_line,
    point_name,
    with_times,
    write_page,
    write_results,
)
from secateur.jobs.open_task import Opened, look, open_host, prepare_search
from secateur.jobs.prune_model import Data, Stage, Tuning, run, save_dense
from secateur.records.provenance import data_file
from secateur.report.bundle import check_packages
from secateur.search.journal import work_folder
from secateur.search.points import Found
from secateur.search.target import make_target
from secateur.search.walk import automatic
from secateur.select import Element, Unit
from secateur.tasks.base.batches import Batches
from secateur.tasks.base.evaluate import Reference, Track, evaluate, silent
from secateur.tasks.base.task import Options, Task
from secateur.torch.host import TorchHost
from secateur.torch.reloaded import reload_gap
from secateur.training.fine_tune import fine_tune

SHAPE = (1, 128)
"""Batch and tokens of the calls that are timed, on one thread."""
EXPORTED = ("onnx", "openvino")
"""Where models are timed beside torch and secateur, as far as these are installed."""
TURNS = 10
LONG, LONG_TEXTS, WORDS = 256, 40, 230
"""Tokens of a long text, how many there are at most, and words that fill one for sure."""
ZEROS = "80% zeros"
Say = Callable[[str], None]


@dataclass
class _Stages:
    """Counts stages aloud, and notes what each took."""

    count: int
    say: Say
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def next(self, name: str, text: str) -> Iterator[None]:
        self.say(f"stage {len(self.seconds) + 1} of {self.count}: {text}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.say(f"  {self.seconds[name]:.0f} s")


def procedures(settings: Settings) -> dict[str, tuple[Stage, Tuning]]:
    """What is pruned by hand, by name. Magnitude over all weights together is one threshold on |w|."""
    tuning = Tuning(settings.epochs, settings.learning_rate, settings.seed + 1)
    long = replace(
        tuning, epochs=2 * tuning.epochs, learning_rate=1.5 * tuning.learning_rate, distil=True, gradual=True
    )
    main = {
        ZEROS: (Stage(criteria.magnitude, Element(), Global(0.8)), long),
        "half the heads and neurons": (Stage(criteria.fisher, Unit("head", "ffn"), Uniform(0.5)), tuning),
    }
    textbook = {
        "gradient rank, 30%": (Stage(criteria.gradient, Element(), Uniform(0.3)), tuning),
        "attention score, half the heads": (Stage(criteria.attention_output, Unit("head"), Uniform(0.5)), tuning),
    }
    return main | textbook if settings.has_textbook else main


def run_demo(
    output: Path,
    cache: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    track: Track = silent,
    say: Say = lambda text: None,
) -> Shown:
    """Train (or take from the cache), search, prune by hand, save, reload, time; write the folder `output`.

    The folder holds the dense model and the others, `train.csv` and `test.csv`, `demo.json`, `demo.png` and
    `report.html`.
    """
    train, test = demo_rows(settings)
    check_packages()  # before anything is trained, as the runtime
    if settings.runtime in TARGETS:
        find(settings.runtime)
    recipes = procedures(settings)
    stages = _Stages(5 + len(recipes) + settings.has_textbook, say)
    with stages.next("dense", f"train MiniLM on {len(train):,} {described(settings)}; {len(test):,} are held out"):
        folder, cached = dense_model(settings, cache, train, progress=track)
        say(f"dense model {'taken from the cache' if cached else 'trained'}: {folder}; now its named axes are traced")
        opened = look(str(folder), None)
        host, task = open_host(opened, options_of(settings))
        examples = task.encode(train)
        calibration = Batches(task, examples.take(settings.calibration_rows), BATCH)
        files = [data_file(role, part.source, len(part)) for role, part in (("training", train), ("test", test))]
        data = Data(task, examples, calibration, Batches(task, task.encode(test), 64), BATCH, files)
        reference = Reference(task, host.model, data.test, track)
    with new_folder(output, overwrite=overwrite) as partial:
        save_dense(host, partial / "dense", task)
        lines = [dense_line(host, reference.evaluation(), partial)]
        if settings.has_textbook:
            with stages.next("dense, trained on", "the dense model trains on for as long as the pruned ones will"):
                lines.append(trained_on(lines[0], host, data, settings, partial, reference, track))
        asked = " and ".join(f"{speed:g} times" for speed in settings.speed_ups)
        healed = "" if settings.heal_seconds else ", without training"
        with stages.next("search", f"a search for {asked} the speed on {settings.runtime}{healed}"):
            found = searched(host, task, (train, test), settings, partial / "searched", track, say)
        lines += [point_line(point, "chosen", lines[0]) for point in found.points]
        for name, (stage, tuning) in recipes.items():
            with stages.next(name, f"{name}: score, choose, check, remove, train, save, reload"):
                outcome = run(name, host, [stage], data, tuning, partial / slug(name), reference=reference, track=track)
                lines.append(outcome_line(outcome, lines[0]))
        with stages.next("tokens", f"texts of {LONG} tokens, of which fewer and fewer go on"):
            tokens, token_times = fewer_tokens(opened, host, test, settings, partial / TOKENS, track)
        with stages.next("latency", f"latency, {SHAPE[0]} x {SHAPE[1]} tokens, one thread, all models in turn"):
            model_times = timed_everywhere(lines, found, partial, settings, say)
            lines = [with_times(line, model_times.timings) for line in lines]
        with stages.next("report", "report and plot"):
            uniform = [point_line(point, "uniform", lines[0]) for point in found.baselines]
            shown = Shown(lines, uniform, tokens, settings.runtime, settings.speed_ups, len(test), stages.seconds)
            write_rows(train, partial / "train.csv")
            write_rows(test, partial / "test.csv")
            write_results(shown, settings, partial)
            write_page(model_times, token_times, shown, partial)
    return shown


# -- stages -----------------------------------------------------------------------------------------------------------


def trained_on(
    dense: Line, host: TorchHost, data: Data, settings: Settings, output: Path, reference: Reference, track: Track
) -> Line:
    """The dense model after as much more training as the pruned model that trains longest, which it is fair to compare
    that one with."""
    longer = host.copy()
    fine_tune(
        longer,
        data.task,
        data.train,
        epochs=2 * settings.epochs,
        learning_rate=settings.learning_rate,
        batch_size=data.batch_size,
        seed=settings.seed + 1,
        progress=track,
    )
    name = "dense, trained on"
    folder = output / slug(name)
    save_dense(longer, folder, data.task)
    reload_gap(longer, folder, data.test[0])
    tuned = evaluate(data.task, longer.model, data.test, reference, track)
    return replace(dense, name=name, folder=slug(name), group="trained", tuned=tuned.value, kl=tuned.kl)


def searched(
    host: TorchHost,
    task: Task,
    parts: tuple[Table, Table],
    settings: Settings,
    output: Path,
    track: Track,
    say: Say,
) -> Found:
    """The models of the search, one for each speed-up, in folders under `output`."""
    rows = prepare_search(
        task, *parts, calibration_samples=settings.calibration_rows, batch_size=BATCH, seed=settings.seed
    )
    target = make_target(on=settings.runtime, frontier=settings.speed_ups, batch=SHAPE[0], length=SHAPE[1])
    return automatic(
        host,
        task,
        target,
        rows,
        output,
        frontier=settings.speed_ups,
        heal_seconds=settings.heal_seconds,
        search_seconds=settings.search_seconds,
        seed=settings.seed,
        work=work_folder(host, task, rows),
        track=track,
        say=say,
    )


def fewer_tokens(
    opened: Opened, host: TorchHost, rows: Table, settings: Settings, folder: Path, track: Track
) -> tuple[FewerTokens, Bench]:
    """A schedule of tokens on long texts, beside all tokens, and the times behind it."""
    task = opened.of(host.model, Options(max_length=LONG, seed=settings.seed))
    texts = long_texts(rows)
    batches = Batches(task, task.encode(texts), 8)
    wanted = schedule_tokens.Wanted("mid")
    made = schedule_tokens.run(host, wanted, folder, task=task, test=batches, track=track)
    runtimes = ["torch", settings.runtime] if settings.has_textbook else ["torch"]
    result = bench([folder], list(dict.fromkeys(runtimes)), batch=(1,), length=(LONG,), turns=TURNS)
    times = {(t.runtime, t.model == folder.name): t.median_ms for t in result.timings if not t.error}
    latency = {name: times[name, True] / times[name, False] for name in runtimes if (name, True) in times}
    assert made.pruned is not None
    agreement = 1 - (made.pruned.flips or 0.0)
    return FewerTokens(len(texts), LONG, agreement, made.schedule.keep, latency), result


def long_texts(rows: Table, words: int = WORDS, most: int = LONG_TEXTS) -> Table:
    """Reviews with one label after the other, until a text has so many words; the last reviews may be left over."""
    texts: list[str] = []
    labels: list[str] = []
    for label in sorted(set(rows.column("label"))):
        part: list[str] = []
        for text, its in zip(rows.column("text"), rows.column("label"), strict=True):
            if its != label:
                continue
            part += text.split()
            if len(part) >= words:
                texts.append(" ".join(part))
                labels.append(label)
                part = []
    order = range(0, len(texts), max(1, -(-len(texts) // most)))
    return Table({"text": [texts[i] for i in order], "label": [labels[i] for i in order]}, rows.source)


def timed_everywhere(lines: Sequence[Line], found: Found, output: Path, settings: Settings, say: Say) -> Bench:
    """Each model on each runtime that is installed, in turn with the dense one.

    Zeros run on secateur's operators in ONNX Runtime; what the search has exported is not exported again. Without the
    textbook procedures, units that were pruned by hand are exported for the search's runtime alone, to save time.
    """
    folders = {line.name: output / line.folder for line in lines}
    fewer = [line.name for line in lines if settings.has_textbook or line.group != "units"]
    rest = [name for name in EXPORTED if name != settings.runtime]
    exported = [(point, m) for point in found.points for m in point.measured.values() if m.runtime in TARGETS]
    ready = {(point_name(point), m.runtime): m.artefact for point, m in exported}
    ready |= {(lines[0].name, m.runtime): m.dense_artefact for point, m in exported if point is found.points[0]}

    def make(name: str, runtime: str, destination: Path, shape: Shape) -> Path:
        if (name, runtime) in ready:
            return ready[name, runtime]
        if (name, runtime) == (ZEROS, "onnx"):
            export(folders[name], runtime, destination, sparse=True, tokens=SHAPE[0] * SHAPE[1])
            return destination
        return artefact(folders[name], runtime, destination, shape, loading={})

    def timed(names: Sequence[str], runtimes: Sequence[str]) -> list[Timing]:
        here = [name for name in runtimes if name in installed()]
        options: dict[str, Any] = {"threads": 1, "turns": TURNS, "result": of_timings, "say": say}
        made = in_turn(names, here, (SHAPE[0],), (SHAPE[1],), make, lambda runtime: False, **options)
        return made.timings

    first = list(dict.fromkeys([*OURS, settings.runtime]))
    return of_timings([*timed(list(folders), first), *timed(fewer, rest)])


def of_timings(timings: list[Timing]) -> Bench:
    """What was timed on one thread here."""
    return Bench(timings, [], 1, runner.machine())
