"""Writes the Markdown of `tasks.py write` from the results that its rows stored under .cache/tasks/results."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setting import setting

PACKAGES = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino")
TARGETS = ("onnx", "openvino")


def write(results: Path, titles: Mapping[str, str], threads: int) -> Path:
    """Write the dated Markdown under benchmarks/results; returns its path.

    titles: the rows, and what they are in words.
    """
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in titles if _is_there(results, name)}
    day = str(datetime.date.today())
    lines = [
        "# Tasks: what pruning costs each of them, before and after one epoch of healing",
        "",
        setting("`python benchmarks/tasks.py`, then `write`", PACKAGES, f"`--threads {threads}`"),
        "",
        *_scores(found, titles),
        *_longer(found),
        *_exports(found),
        *_commands(found),
    ]
    path = Path(__file__).parent / "results" / f"{day}-tasks.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _is_there(results: Path, name: str) -> bool:
    return (results / f"{name}.json").exists()


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def _scores(found: Mapping[str, Any], titles: Mapping[str, str]) -> list[str]:
    """The first part: metrics, and how many of the rows lost something that healing did not bring back."""
    rows = [_score(name, title, found.get(name, {"failed": "not run"})) for name, title in titles.items()]
    columns = ["task", "model, data", "metric", "dense", "pruned", "healed", "drop (95%)", "flips", "rows", "work left",
               "seconds"]  # fmt: skip
    worse = [name for name in found if _is_worse(found[name])]
    said = "In no row does the interval lie above zero." if not worse else (
        f"Not healed by one epoch, with an interval above zero: {', '.join(worse)}."
    )  # fmt: skip
    return [
        "Units go (heads and FFN neurons, or what the command says); `healed` is after one epoch of fine-tuning in "
        "which the dense model teaches. The drop is that of the saved folder against the dense one, both read and "
        "scored in one `secateur eval`, with a paired bootstrap over rows; positive is worse. The dense model is not "
        "trained for that epoch more, so that healing may also gain. Flips: rows (of texts: tokens) that are answered "
        "in another way than by the dense model. Work: multiply-accumulates. Seconds, several rows at a time: "
        "train, prune with healing, eval. The tiny models learn rules; that of token-classification can be read off "
        "each word and that of audio-classification off each tone, so that half of the model is enough there at once.",
        "",
        *_table(columns, rows),
        said,
        "",
        f"`prune` in memory and `eval` of the reloaded folder gave other values in: {', '.join(_other_drops(found))}."
        if _other_drops(found)
        else "`prune` in memory and `eval` of the reloaded folder gave the same values, digit by digit, in all rows.",
        "",
    ]


def _other_drops(found: Mapping[str, Any]) -> list[str]:
    """Rows in which the reloaded folder scores in another way than the model that `prune` had in memory."""
    both = [(name, r["outcome"]["pruned"], r["evaluation"]["pruned"]) for name, r in found.items() if "evaluation" in r]
    return [f"{name} ({before:.6g} and {after:.6g})" for name, before, after in both if before != after]


def _is_worse(result: Mapping[str, Any]) -> bool:
    interval = result.get("evaluation", {}).get("drop_interval")
    return bool(interval and interval[0] > 0)


def _score(name: str, title: str, result: Mapping[str, Any]) -> list[str]:
    """A line of the first table."""
    if "failed" in result:
        return [name, f"{title}: failed ({result['failed']})"] + [""] * 9
    outcome, evaluation = result["outcome"], result["evaluation"]
    metric = evaluation["metric"]
    stages = [f"{outcome['stages'][stage]['values'][metric]:.3f}" for stage in ("dense", "pruned", "tuned")]
    low, high = evaluation["drop_interval"]
    flips = evaluation["flips"]
    return [
        name,
        title,
        metric,
        *stages,
        f"{evaluation['drop']:+.3f} [{low:+.3f}, {high:+.3f}]",
        "-" if flips is None else f"{100 * flips:.1f}%",
        str(evaluation["rows"]),
        f"{100 * outcome['macs_ratio']:.0f}%",
        " + ".join(f"{result['seconds'].get(stage, 0):.0f}" for stage in ("train", "prune", "eval")),
    ]


def _longer(found: Mapping[str, Any]) -> list[str]:
    """Rows that were healed for longer too."""
    rows = []
    for name, result in found.items():
        if "longer" in result:
            longer, (low, high) = result["longer"], result["longer"]["drop_interval"]
            values = [f"{result['evaluation']['pruned']:.3f}", f"{longer['pruned']:.3f}"]
            drop = f"{longer['drop']:+.3f} [{low:+.3f}, {high:+.3f}]"
            rows.append([name, longer["metric"], f"{longer['dense']:.3f}", *values, str(longer["epochs"]), drop])
    columns = ["task", "metric", "dense", "healed, one epoch", "healed, more", "epochs", "drop (95%)"]
    return [
        "## More epochs",
        "",
        "The same commands with more epochs of healing, for some rows that one epoch did not heal; the drop is that "
        "of `prune` itself.",
        "",
        *_table(columns, rows),
    ]


def _exports(found: Mapping[str, Any]) -> list[str]:
    """The second part: the pruned models in other runtimes, and what else a row checked."""
    rows = []
    for name, result in found.items():
        if result["exports"]:
            rows.append([name, *(part for target in TARGETS for part in _export(result["exports"].get(target)))])
    columns = ["task", *(part for t in TARGETS for part in (f"{t}: relative error", "equal answers", "inputs, shapes"))]
    checks = [f"{name}: {what} {value:.4f}." for name, r in found.items() for what, value in r.get("check", {}).items()]
    return [
        "## The pruned models in ONNX Runtime and OpenVINO",
        "",
        "`secateur export pruned --to TARGET --data TEST --samples 64`: the largest relative error of any output "
        "against PyTorch on the test rows; more than 1e-4 is refused.",
        "",
        *_table(columns, rows),
        *(("Further checks:", "", *(f"- {check}" for check in checks), "") if checks else ()),
    ]


def _export(made: Mapping[str, Any] | None) -> list[str]:
    if made is None:
        return ["not run", "", ""]
    if "failed" in made:
        return [made["failed"], "", ""]
    parity = made["parity"]
    agreement = "-" if parity["agreement"] is None else f"{100 * parity['agreement']:.1f}%"
    return [f"{parity['relative_error']:.1e}", agreement, f"{parity['examples']}, {len(parity['shapes'])}"]


def _commands(found: Mapping[str, Any]) -> list[str]:
    """What was run, to be run again in `.cache/tasks/ROW`."""
    lines = ["## Commands", "", "In the folder of each row, with `--threads` and `--json`:", ""]
    for name, result in found.items():
        lines += [f"{name}:", "", "```", *result["commands"], "```", ""]
    return lines
