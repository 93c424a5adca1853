"""The card of a model: front matter that a hub reads, and text for people, from the record and the files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import yaml

from secateur._version import __version__
from secateur.card.facts import PICTURES, Facts
from secateur.card.loading import AUTO, loading
from secateur.card.markdown import code, fence, line, number, plain, table
from secateur.schemas.record import Quality, Record, Sizes, Speed, Units

HOME = "https://github.com/secateur/secateur"
KEPT = ("language", "license", "license_name", "license_link", "base_model")
"""Entries of the front matter that hold for the pruned model as they do for the dense one."""
PRUNED = "pruning"
"""The tag of a pruned model."""
MOST_ROWS = 100
"""The most rows of a table."""
_HUB_ID = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?!\.))*(?:/[A-Za-z0-9](?:[\w-]|\.(?!\.))*)?", re.ASCII)


def card(record: Record, facts: Facts, front: Mapping[str, Any] | None = None) -> str:
    """The whole card: front matter and text. front: entries that are kept, see `front_matter`."""
    return joined(front_matter(record, facts, front or {}), body(record, facts, front or {}))


def joined(entries: Mapping[str, Any], text: str) -> str:
    """Front matter and text as one file."""
    dumped = yaml.safe_dump(dict(entries), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{dumped}---\n\n{text}"


def is_hub_id(name: object) -> bool:
    """Whether something has the form of a hub id, such as `org/name`."""
    return isinstance(name, str) and len(name) <= 96 and _HUB_ID.fullmatch(name) is not None


def carried(front: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `KEPT` that are one line of text or a list of lines, and models by their hub ids."""
    found: dict[str, Any] = {}
    for key in KEPT:
        value = front.get(key)
        values = value if isinstance(value, list) else [value]
        if values and all(isinstance(v, str) and v.strip() and line(v) == v and len(v) <= 500 for v in values):
            found[key] = value
    bases = found.get("base_model")
    if bases is not None and not all(map(is_hub_id, bases if isinstance(bases, list) else [bases])):
        del found["base_model"]
    return found


def front_matter(record: Record, facts: Facts, front: Mapping[str, Any]) -> dict[str, Any]:
    """What a hub reads of a card.

    front: entries of an earlier card of the model, or of the dense model's card: those of `KEPT` stay, and so do those
        that secateur does not write.
    """
    task = record.task if record.task in AUTO or record.task == "feature-extraction" else None
    entries: dict[str, Any] = carried(front)
    if facts.opens != "plain":
        entries["library_name"] = "sentence-transformers" if facts.is_sentence else "transformers"
        if task is not None:
            entries["pipeline_tag"] = "sentence-similarity" if facts.is_sentence else task
    others = front.get("tags")
    kept = [tag for tag in others if isinstance(tag, str)] if isinstance(others, list) else []
    entries["tags"] = list(dict.fromkeys(["secateur", *([PRUNED] if is_pruned(record, facts) else []), *kept]))
    results = _results(record)
    if results:
        entries["model-index"] = [{"name": line(record.title) or "pruned model", "results": results}]
    written = {*KEPT, "library_name", "pipeline_tag", "tags", "model-index"}
    return entries | {key: value for key, value in front.items() if key not in written}


def is_pruned(record: Record, facts: Facts) -> bool:
    """Whether the record or the files say that something was pruned; a stock checkpoint by itself does not."""
    has_zeros = any(matrix.density < 1 for matrix in record.matrices)
    return bool(facts.opens != "stock" or facts.steps or facts.masked or has_zeros or _changed(record, facts))


def _changed(record: Record, facts: Facts) -> list[Units]:
    """The axes of those kinds of which some units are gone."""
    units = record.units or facts.units
    kinds = {unit.kind for unit in units if unit.kept < unit.total}
    return [unit for unit in units if unit.kind in kinds]


def _results(record: Record) -> list[dict[str, Any]]:
    """The quality in the form of a model index; nothing where the rows have no labels, or the task has no name."""
    quality = record.quality
    if quality is None or quality.is_against_dense or record.task not in AUTO:
        return []
    files = record.provenance.data if record.provenance else []
    name = next((line(file.name) for file in files if file.role == "test"), "") or "held-out rows"
    return [
        {
            "task": {"type": record.task},
            "dataset": {"name": name, "type": _word(name) or "custom"},
            "metrics": [{"type": _word(quality.metric) or "score", "value": quality.pruned, "name": quality.metric}],
        }
    ]


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def body(record: Record, facts: Facts, front: Mapping[str, Any]) -> str:
    """The text of a card."""
    sections = (
        _head(record, facts, front),
        _opening(record, facts),
        _asked(record),
        _quality(record),
        _sizes(record.sizes),
        _speeds(record),
        _pictures(facts),
        _removed(record, facts),
        _made(record),
        _notes(record),
    )
    return "\n".join([text for section in sections for text in section]).rstrip() + "\n"


def _head(record: Record, facts: Facts, front: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {plain(record.title) or 'Pruned model'}"
    yield ""
    base = carried(front).get("base_model", [])
    links = [f"[{plain(name)}](https://huggingface.co/{name})" for name in ([base] if isinstance(base, str) else base)]
    kind = record.model_type or facts.model_type
    based = " and ".join(links)
    based = based if based or not kind else f"a model of type {code(kind)}"
    done = "pruned" if is_pruned(record, facts) or PRUNED in (front.get("tags") or ()) else "saved"
    yield f"{f'Based on {based}; {done}' if based else done.capitalize()} with [secateur]({HOME})."
    yield ""
    if record.reading:
        yield plain(record.reading)
        yield ""


def _opening(record: Record, facts: Facts) -> Iterator[str]:
    yield "## How to open it"
    yield ""
    if facts.opens == "shrunk":
        yield f"`pip install secateur` first, and import it: {facts.reason}."
    elif facts.opens == "plain":
        yield "The weights belong to a PyTorch module of your own; `pip install secateur` opens them."
    else:
        yield "It is a stock checkpoint, which opens without secateur."
    yield ""
    yield from fence(loading(record.task, facts), "python")


def _asked(record: Record) -> Iterator[str]:
    if record.asked:
        yield "## What was asked"
        yield ""
        words = {None: "-", True: "yes", False: "no"}
        rows = [(plain(one.what), plain(one.asked), plain(one.reached), words[one.is_met]) for one in record.asked]
        yield from table(("what", "asked", "reached", "met"), rows, left=4)


def _quality(record: Record) -> Iterator[str]:
    quality = record.quality
    if quality is None:
        return
    yield "## Quality"
    yield ""
    yield from table(
        ("metric", "dense model", "this model"),
        [(plain(quality.metric), number(quality.dense), number(quality.pruned))],
    )
    yield _drop(quality)
    yield ""
    if len(record.stages) > 1:
        rows = [(plain(stage.name), number(stage.value), number(stage.divergence)) for stage in record.stages]
        yield from table(("after", plain(quality.metric), f"{plain(quality.divergence_name)} to dense"), rows)


def _drop(quality: Quality) -> str:
    parts = [f"Measured on {quality.rows:,} rows; the drop is {number(quality.drop)}"]
    if quality.interval is not None:
        low, high = quality.interval
        parts.append(f" (95% interval {number(low)} to {number(high)})")
    if quality.divergence is not None:
        parts.append(f", the divergence ({plain(quality.divergence_name)}) {number(quality.divergence)}")
    if quality.flips is not None:
        parts.append(f", and {quality.flips:.1%} of the answers are others")
    parts.append(".")
    if quality.is_against_dense:
        parts.append(" The rows have no labels: the dense model's answers take their place.")
    return "".join(parts)


def _sizes(sizes: Sizes | None) -> Iterator[str]:
    if sizes is None:
        return
    yield "## Size"
    yield ""
    rows = [("parameters", number(sizes.dense_parameters), number(sizes.parameters))]
    if sizes.nonzero is not None and sizes.nonzero != sizes.parameters:
        rows.append(("parameters that are not zero", number(sizes.dense_parameters), number(sizes.nonzero)))
    if sizes.bytes is not None:
        rows.append(("bytes", number(sizes.dense_bytes), number(sizes.bytes)))
    if sizes.macs_share is not None:
        rows.append(("multiply-accumulates", "100%", f"{sizes.macs_share:.1%}"))
    yield from table(("", "dense model", "this model"), rows)


def _speeds(record: Record) -> Iterator[str]:
    if not record.speeds:
        return
    yield "## Speed"
    yield ""
    rows = [
        (
            plain(one.runtime),
            one.what,
            f"{one.batch} x {one.length}" if one.length else str(one.batch),
            str(one.threads),
            _span(one.dense_ms, one.dense_low_ms, one.dense_high_ms),
            _span(one.ms, one.low_ms, one.high_ms),
            _ratio(one),
        )
        for one in record.speeds[:MOST_ROWS]
    ]
    columns = ("runtime", "call", "batch x tokens", "threads", "dense, ms", "this model, ms", "times as fast")
    yield from table(columns, rows, left=2)
    machine = record.provenance.machine if record.provenance else None
    if machine is not None:
        cores = f"{machine.cores} cores" if machine.cores else ""
        parts = [line(part) for part in (machine.processor, cores, machine.system) if part]
        where = f" on {plain(', '.join(parts))}" if parts else ""
        yield f"Both models were timed in turn{where}; quartiles in parentheses."
    else:
        yield "Both models were timed in turn on one machine; quartiles in parentheses."
    yield ""


def _span(ms: float | None, low: float | None, high: float | None) -> str:
    return number(ms) if low is None or high is None else f"{number(ms)} ({number(low)} to {number(high)})"


def _ratio(speed: Speed) -> str:
    return "-" if not speed.dense_ms or not speed.ms else f"{speed.dense_ms / speed.ms:.2f}"


def _pictures(facts: Facts) -> Iterator[str]:
    for name in facts.pictures:
        yield f"![{PICTURES[name]}]({name})"
        yield ""


def _removed(record: Record, facts: Facts) -> Iterator[str]:
    units = _changed(record, facts)
    has_zeros = any(matrix.density < 1 for matrix in record.matrices)
    if not (units or facts.steps or facts.masked or has_zeros):
        return
    yield "## What was pruned"
    yield ""
    if facts.steps:
        names = {"criterion": "criterion", "repair": "repair", "pattern": "pattern", "budget": "how much"}
        shown = [key for key in names if any(step.get(key) is not None for step in facts.steps)]
        if shown:
            rows = [
                [code(step.get(key)) if step.get(key) is not None else "-" for key in shown] for step in facts.steps
            ]
            yield from table([names[key] for key in shown], rows, left=len(shown))
    if units:
        yield "Units that are left, of those that the dense model has, by block:"
        yield ""
        yield from _unit_table(units)
    if facts.masked and not has_zeros:
        yield f"Single weights of {facts.masked} parameters are zero."
        yield ""
    if has_zeros:
        low, high = (f(matrix.density for matrix in record.matrices) for f in (min, max))
        yield f"Of each of {len(record.matrices)} linear layers {low:.1%} to {high:.1%} of the weights are not zero."
        yield ""


def _unit_table(units: Sequence[Units]) -> Iterator[str]:
    """Kept units by block and kind; blocks in a row that keep as many share a line."""
    kinds = list(dict.fromkeys(plain(unit.kind) for unit in units))
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for unit in units:
        prefix = unit.axis.rpartition(".")[0]
        part = re.sub(r"(?:^|\.)L\d+$", "", prefix)
        place = (part, -1 if unit.block is None else unit.block)
        cells.setdefault(place, {})[plain(unit.kind)] = f"{unit.kept} of {unit.total}"
    rows = []
    for (part, kept), group in groupby(
        sorted(cells), key=lambda place: (place[0], tuple(sorted(cells[place].items())))
    ):
        numbers = [block for _, block in group]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        name = "-" if numbers[0] < 0 else span
        found = dict(kept)
        rows.append((plain(f"{part} {name}".strip()), *(found.get(kind, "-") for kind in kinds)))
    yield from table(("block", *kinds), rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        yield f"{len(rows) - MOST_ROWS} more rows are left out."
        yield ""


def _made(record: Record) -> Iterator[str]:
    made = record.provenance
    yield "## How it was made"
    yield ""
    if made is None:
        yield f"With secateur {plain(__version__)}."
        yield ""
        return
    if made.command:
        yield from fence(line(made.command), "sh")
    facts = [f"on {plain(made.date)}" if made.date else "", f"seed {made.seed}" if made.seed is not None else ""]
    facts += [f"{plain(name)} {plain(version)}" for name, version in made.versions.items()]
    if any(facts):
        yield f"Made {', '.join(fact for fact in facts if fact)}."
        yield ""
    if made.data:
        rows = [
            (
                plain(file.role),
                code(file.name),
                "-" if file.rows is None else f"{file.rows:,}",
                code(file.sha256 or "-"),
            )
            for file in made.data[:MOST_ROWS]
        ]
        yield from table(("data", "file", "rows", "SHA-256"), rows, left=2)


def _notes(record: Record) -> Iterator[str]:
    if record.notes:
        yield "## Notes"
        yield ""
        yield from (f"- {plain(note)}" for note in record.notes)
        yield ""
