"""Records of what `eval` and `bench` measured, joined with the record that lies in the model's folder."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.deploy import runner
from secateur.deploy.jobs.results import Bench, Timing
from secateur.metrics.drop import Drop
from secateur.metrics.evaluation import Evaluation
from secateur.record import read_record
from secateur.records.provenance import provenance_of
from secateur.records.quality import are_finite, finite, in_words, parity_of, quality_of, share, stages_of
from secateur.schemas.record import DataFile, Example, Form, Parity, Quality, Record, Speed, Stage
from secateur.schemas.results import Machine
from secateur.scores import TextScore

if TYPE_CHECKING:
    from secateur.jobs.language.rows import Row  # needs PyTorch, which Keras models do without


def evaluated(
    model: str,
    found: Evaluation,
    drop: Drop | None,
    *,
    dense: Evaluation | None = None,
    examples: Sequence[Example] = (),
    data: Iterable[DataFile] = (),
    seconds: float | None = None,
) -> Record:
    """The record of an evaluation.

    model: the folder or hub id. drop, dense: from the dense model, and its evaluation; None where it was not given.
    examples: rows on which the two disagree.

    Raises ModelError for a folder whose record is damaged.
    """
    reading = f"{found.metric} {found.value:.4f} on {found.rows:,} rows" if drop is None else in_words(drop)
    record = Record(
        title=name_of(model),
        task=found.task,
        reading=reading,
        quality=None if drop is None else quality_of(drop, found),
        stages=stages_of([("dense", dense), ("this model", found)]),
        examples=list(examples),
        notes=[] if drop is None else [drop.reading],
        provenance=provenance_of(seconds=seconds, data=data),
    )
    return joined(own_record(model), record)


def scored(
    model: str,
    score: TextScore,
    rows: "Iterable[Row]" = (),
    data: Iterable[DataFile] = (),
    seconds: float | None = None,
) -> Record:
    """The record of a language model that was scored on a text: its loss for a token, and the dense model's.

    rows: both models with fewer bits too.

    Raises ModelError as `evaluated`.
    """
    words, stages, quality = f"perplexity {score.perplexity:.2f}", [], None
    if are_finite(score.loss):
        stages.append(Stage(name="this model", value=score.loss, divergence=finite(score.kl)))
    if score.delta is not None and score.dense_perplexity is not None and are_finite(score.loss, score.delta):
        dense = score.loss - score.delta
        stages.insert(0, Stage(name="dense", value=dense))
        words += f", dense {score.dense_perplexity:.2f}"
        quality = Quality(
            metric="loss for a token (nats)",
            is_higher_better=False,
            dense=dense,
            pruned=score.loss,
            drop=score.delta,
            interval=list(score.interval) if score.interval is not None and are_finite(*score.interval) else None,
            rows=score.windows,
            divergence=finite(score.kl),
            flips=share(score.flips),
        )
    record = Record(
        title=name_of(model),
        task="text-generation",
        reading=words,
        quality=quality,
        stages=stages,
        forms=[_form(row) for row in rows if are_finite(row.score.loss)],
        notes=[f"collapsed: {score.collapsed}"] if score.collapsed else [],
        provenance=provenance_of(seconds=seconds, data=data),
    )
    return joined(own_record(model), record)


def _form(row: "Row") -> Form:
    """A row as a record keeps it."""
    score, speed = row.score, row.speed
    is_known = score.interval is not None and are_finite(*score.interval)
    return Form(
        name=row.name,
        bytes=row.bytes,
        value=score.loss,
        drop=finite(score.delta),
        interval=list(score.interval) if score.interval is not None and is_known else None,
        divergence=finite(score.kl),
        flips=share(score.flips),
        prompt_speed=None if speed is None else speed.prompt,
        decode_speed=None if speed is None else speed.decode,
    )


def benched(result: Bench, folders: Mapping[str, Path]) -> list[Record]:
    """A record for each model that was timed, in their order; the first one is the dense model.

    folders: name of a model in the timings -> its folder, where there is one.

    Raises ModelError for a folder whose record is damaged.
    """
    names = list(dict.fromkeys(timing.model for timing in result.timings))
    dense = {_call(t): t for t in result.timings if names and t.model == names[0] and not t.error}
    machine = Machine(**result.machine)
    where = f"timed on {machine.processor}, " if machine.processor else "timed with "
    note = f"{where}{result.threads} thread{'' if result.threads == 1 else 's'} a process"
    records = []
    for name in names:
        own = [t for t in result.timings if t.model == name]
        folder = folders.get(name)
        beside = {} if name == names[0] else dense
        refused = [f"{t.runtime}: {t.error}" for t in own if t.error]
        record = Record(
            title=name,
            speeds=[speed_of(t, result.threads, beside.get(_call(t))) for t in own if not t.error],
            parities=[] if folder is None else parities_of(folder),
            notes=[note, *dict.fromkeys(refused), *(text for text in result.warnings if name in text)],
            provenance=provenance_of().model_copy(update={"machine": machine}),
        )
        records.append(joined(None if folder is None else read_record(folder), record))
    return records


def speed_of(timing: Timing, threads: int, dense: Timing | None = None) -> Speed:
    """The times of a model at one call. threads: of its process. dense: the dense model at the same call."""
    return Speed(
        runtime=timing.runtime,
        batch=timing.batch,
        length=timing.length,
        threads=threads,
        ms=timing.median_ms,
        low_ms=timing.low_ms,
        high_ms=timing.high_ms,
        dense_ms=None if dense is None else dense.median_ms,
        dense_low_ms=None if dense is None else dense.low_ms,
        dense_high_ms=None if dense is None else dense.high_ms,
        peak_bytes=timing.peak_bytes or None,
    )


def parities_of(folder: Path) -> list[Parity]:
    """How far the artefact in a folder is from the framework's model; nothing for other folders."""
    if not (folder / runner.MANIFEST).is_file():
        return []
    info = runner.read(folder)
    return parity_of(info["target"], info.get("parity"))


def joined(own: Record | None, new: Record) -> Record:
    """What was measured now, and what the record in the model's folder says beside it.

    How the model was made stays as that record says it; notes of both count.
    """
    if own is None:
        return new
    kept = {name: value for name in Record.model_fields if (value := getattr(new, name))}
    kept |= {"provenance": own.provenance or new.provenance, "notes": list(dict.fromkeys([*own.notes, *new.notes]))}
    return own.model_copy(update=kept)


def own_record(model: str) -> Record | None:
    """The record in the folder of a model; None for a hub id, a file, and a folder without one."""
    return read_record(Path(model)) if Path(model).is_dir() else None


def name_of(model: str) -> str:
    """A model's name for people: the last part of its path, or the hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


def _call(timing: Timing) -> tuple[str, int, int]:
    return timing.runtime, timing.batch, timing.length
