"""The formats that need no torch: what a whole case looks like, and how the project reads it."""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.kernels import KERNELS
from tests.fuzz.mutate import Case
from tests.fuzz.run import Format

KEPT = Path(__file__).parents[1] / "kept"
RECIPE = """\
# how a decoder is pruned
model: dense
output: out
task: CausalLM
criterion: wanda+swaps
pattern: element
sparsity: 0.5
sensitivity: {windows: 8, spread: 0.15}
calibration:
- text.txt
- more.txt
samples: 16
context: 64
seed: 3
memory: 4GiB
reconstruct:
  passes: 2.0
  rate: 0.01
distil: true
"""
SECOND_RECIPE = "criterion: sparsegpt\noptions: {damp: 0.05}\npattern: 2:4\ncalibration: a.txt\n"
LAYOUT = """\
axes
  L0.kv     2 kv
  L0.group  2 group
  L0.head   4 head = L0.kv L0.group
  L0.qk     3 qk frozen: slice in rotary embedding
  L0.v      3 v
  L0.ffn    5 ffn multiple 1
  hidden    4 hidden
  layers    1 layer @ layers
parameters
  layers.0.q.weight    : (L0.kv L0.group L0.qk) hidden < x0 1
  layers.0.k.weight    : (L0.kv L0.qk) hidden < x0 1
  layers.0.o.weight    : hidden (L0.kv L0.group L0.v)
  layers.0.fused.bias  : (L0.ffn + L0.ffn)
  layers.0.square      : hidden hidden
  layers.0.scalar      :
tied
  head.weight = layers.0.square
products
  7 layers.0.q.weight : (L0.kv L0.group L0.qk) hidden
  6 - : (L0.kv L0.group) L0.qk
"""
CSV = 'text,label\nfine,1\n"two, lines",0\nNA,1\n3.5,0\n'
JSON_LINES = '{"text": "fine", "label": 1}\n{"text": "two", "label": "0"}\n{"text": "three", "label": 1.0}\n'


def folder(path: Path, keep: Callable[[str], bool] = lambda name: True) -> Case:
    """The files of a folder as a case."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and keep(file.name))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def kept(pattern: str, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Case]:
    """Kept folders of all times as cases, by name."""
    return {str(place.relative_to(KEPT)): folder(place, keep) for place in sorted(KEPT.glob(f"*/{pattern}"))}


# -- plans ------------------------------------------------------------------------------------------------------------


def _plan_seeds() -> Mapping[str, Case]:
    return kept("plan", lambda name: name.startswith("plan")) | {
        name: {file: data for file, data in case.items() if file.startswith("plan")}
        for name, case in (kept("folders/*/model") | kept("keras/model")).items()
    }


def _read_plan(place: Path) -> Any:
    from secateur.plan import Plan

    plan = Plan.load(place)
    (place / "again").mkdir()
    plan.save(place / "again")
    again = Plan.load(place / "again")
    return plan, again, plan.structured


# -- measurements -----------------------------------------------------------------------------------------------------


def _result_seeds() -> Mapping[str, Case]:
    return kept("results", lambda name: name != "latency.json")


def _read_results(place: Path) -> Any:
    from secateur.deploy.jobs.kit import read_results

    bench = read_results(place)
    return bench.timings, bench.machine, [str(line) for line in bench.notes] if hasattr(bench, "notes") else None


def _artefact_seeds() -> Mapping[str, Case]:
    return kept("artefacts/*/model") | kept("keras/artefact")


def _read_artefact(place: Path) -> Any:
    from secateur.deploy import runner

    return runner.read(place)


def _read_made_up(place: Path) -> Any:
    """The inputs that are made up for an artefact, which its description decides."""
    from secateur.deploy import runner

    info = runner.read(place)
    made = {}
    for name, graph in info["graphs"].items():
        made[name] = runner.made_up(graph, runner.sizes_for(graph, 1, 4))
    return info["target"], made


def _record_seeds() -> Mapping[str, Case]:
    quality = {"metric": "accuracy", "dense": 0.9, "pruned": 0.875, "drop": 0.025, "interval": [0.0, 0.05], "rows": 40}
    speed = {"runtime": "onnx", "what": "prompt", "batch": 1, "length": 128, "threads": 1, "ms": 2.5, "dense_ms": 5.0}
    point = {"name": "2x", "group": "chosen", "latency_share": 0.5, "value": 0.875, "is_result": True}
    units = {"axis": "L0.ffn", "kind": "ffn", "block": 0, "kept": 3, "total": 8}
    matrix = {"name": "up.weight", "block": 0, "shape": [3, 4], "dense_shape": [8, 4], "density": 0.5}
    curve = {"name": "healing", "x": "epochs", "y": "KL", "points": [[0.0, 1.0], [1.0, 0.5]]}
    data = {"role": "test", "name": "rows.csv", "rows": 40, "sha256": "0" * 64}
    made = {"command": "secateur prune m", "date": "2026-01-02T03:04:05+00:00", "seconds": 1.5, "data": [data]}
    whole = {"title": "small", "quality": quality, "speeds": [speed], "frontier": [point], "units": [units]}
    whole |= {"matrices": [matrix], "curves": [curve], "provenance": made, "format": 1}
    return {name: {"secateur-record.json": json.dumps(value).encode()} for name, value in {"whole": whole}.items()}


def _read_record(place: Path) -> Any:
    from secateur.record import read_record, write_record

    record = read_record(place)
    if record is not None:
        (place / "again").mkdir()
        write_record(record, place / "again")
        return record.model_dump(), read_record(place / "again") == record.model_copy(update={"examples": []})
    return None


# -- text -------------------------------------------------------------------------------------------------------------


def _read_recipe(place: Path) -> Any:
    from secateur.recipe import read_recipe

    recipe = read_recipe(place / "recipe.yaml")
    return recipe.model_dump(mode="json"), recipe.identity(), recipe.walks, recipe.readers


def _read_layout(place: Path) -> Any:
    from secateur.cli.common import read_layout
    from secateur.layout import Layout

    layout = read_layout(place / "layout.txt")
    assert layout is not None
    text = str(layout)
    return text, str(Layout.from_text(text)), [layout.shape(name) for name in layout.params]


def _read_rows(place: Path) -> Any:
    from secateur.data.columns import texts
    from secateur.data.read import read_table
    from secateur.data.table import split_table

    table = read_table(next(place.iterdir(), place / "rows.csv"))
    words, labels = texts(table, "text"), texts(table, "label")
    return words, labels, [part.column("text") for part in split_table(table, 0.5)]


def _row_seeds() -> Mapping[str, Case]:
    table = [json.loads(line) for line in JSON_LINES.splitlines()]
    return {
        "csv": {"rows.csv": CSV.encode()},
        "tsv": {"rows.tsv": CSV.replace(",", "\t").encode()},
        "jsonl": {"rows.jsonl": JSON_LINES.encode()},
        "json": {"rows.json": json.dumps(table).encode()},
    }


# -- sentence-transformers folders ------------------------------------------------------------------------------------


def _sentence_seeds() -> Mapping[str, Case]:
    from safetensors.numpy import save

    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [
        {"idx": i, "name": str(i), "path": f"{i}_{name}", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(("Pooling", "Dense", "Normalize"), 1)
    ]
    dense = {
        "in_features": 6,
        "out_features": 4,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "find "}, "default_prompt_name": "query"},
        "2_Dense/config.json": dense,
    }
    old = {"word_embedding_dimension": 3, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    new = {"embedding_dimension": 3, "pooling_mode": ["max", "lasttoken"], "include_prompt": True}
    weights = {"linear.weight": np.ones((4, 6), np.float32), "linear.bias": np.zeros(4, np.float32)}
    return {
        name: {file: json.dumps(value).encode() for file, value in {**files, "1_Pooling/config.json": pooling}.items()}
        | {"2_Dense/model.safetensors": save(weights)}
        for name, pooling in {"old": old, "new": new}.items()
    }


def _read_sentence_folder(place: Path) -> Any:
    import torch

    from secateur.torch.data.pooling import read_embedding
    from secateur.torch.files.companions import companions_of

    embedding = read_embedding(place)
    inside = [(place / name).resolve().is_relative_to(place.resolve()) for name in companions_of(place)]
    assert all(inside)
    vectors = torch.ones(2, 4, 3)
    if len(embedding.modes) * 3 == 6 or not embedding.steps:
        assert len(embedding.of(vectors, torch.ones(2, 4))) == 2
    return embedding.modes, embedding.max_length, embedding.prompt, embedding.texts(["A word"])


# -- journals ---------------------------------------------------------------------------------------------------------

_IDENTITY = {"recipe": {"criterion": "wanda", "sparsity": 0.5}, "model": "abc", "format": 1}


def _journal_seeds() -> Mapping[str, Case]:
    layer = {"name": "a", "weights": 8, "zeros": 4, "error": 0.1, "notes": []}
    block: dict[str, Any] = {"path": "layers.0", "file": "model-00001.safetensors", "error": 0.5, "tuned": [1.0, 0.5]}
    block |= {"layers": [layer], "sha256": "0" * 64, "seconds": 1.0}
    settings = {"batch": 2, "on_disk": True, "expected": 4, "threads": 1, "bfloat16": False}
    journal: dict[str, Any] = {"format": 1, "identity": _IDENTITY, "settings": settings, "blocks": [block]}
    journal |= {"states": {"x-0-0": ["F32", [1, 2]]}, "distilled": None, "finished": False}
    tuned = {**journal, "distilled": [1.0, 0.5], "settings": {**settings, "sparsity": {"a": 0.5}}}
    files = {"result/model-00001.safetensors": b"x", "result/model-00002.safetensors": b"y", "states/s": b"z"}
    return {
        name: {".out.partial/journal.json": json.dumps(data).encode()}
        | {f".out.partial/{k}": v for k, v in files.items()}
        for name, data in {"pruned": journal, "tuned": tuned}.items()
    }


def _read_journal(place: Path) -> Any:
    from secateur.torch.stream.journal import workspace

    journal = place / ".out.partial" / "journal.json"
    before = journal.read_bytes() if journal.is_file() else None
    files = folder(place)
    try:
        with workspace(place / "out", _IDENTITY) as work:
            got = work.resumed, vars(work.journal).copy(), sorted(folder(place))
    finally:
        after = folder(place)
        for name in files.keys() - after.keys():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(files[name])
    return got, before


# -- caches -----------------------------------------------------------------------------------------------------------


class Measured(Exception):
    """A reader went on to measure, as it does without a cache."""


@functools.cache
def _table_key() -> str:
    from secateur.deploy.jobs import latency_table
    from secateur.layout import Layout

    settings = ("onnx", 8, 64, 1, 5, latency_table.STEP, True)
    return latency_table.key_of(Layout.from_text(LAYOUT), *settings)


def _table_seeds() -> Mapping[str, Case]:
    from secateur.deploy.jobs import latency_table
    from secateur.layout import Layout

    layout = Layout.from_text(LAYOUT)
    ratios = {name: 0.5 + 0.01 * i for i, name in enumerate(latency_table.wanted(layout, 5)) if name != "dense"}
    table = latency_table.assemble(layout, "onnx", (8, 64), 1, 5, ratios, 12.5)
    return {"table": {"table.json": json.dumps(table.as_json()).encode()}}


def _read_table(place: Path) -> Any:
    from types import SimpleNamespace
    from unittest import mock

    from secateur.deploy.jobs import latency_table
    from secateur.layout import Layout

    if (place / "table.json").is_file():
        (place / f"latency-{_table_key()}.json").write_bytes((place / "table.json").read_bytes())
    host: Any = SimpleNamespace(layout=Layout.from_text(LAYOUT))

    def measured(*args: Any) -> Any:
        raise Measured("measured again")

    with (
        mock.patch.dict(os.environ, SECATEUR_CACHE=str(place)),
        mock.patch.object(latency_table, "artefacts", measured),
        mock.patch.object(latency_table, "check_runtimes", lambda names: names),
    ):
        table = latency_table.latency_table(host, "onnx")
    answers = [table.predict({}), table.predict({"L0.ffn": 1}), table.predict({"L0.ffn": 2, "L0.kv": 1})]
    if not np.isfinite(answers).all():
        raise ArithmeticError(f"predicts {answers}")
    return answers


def _tuned(place: Path) -> Any:
    """The choice of a format for a layer, from measurements in a folder; what would be measured is made up."""
    from unittest import mock

    from secateur.kernels.packing import pack
    from secateur.runtime.layers import tuning

    packing = {"format": "bitmask", "value": "float32"}
    weight = np.zeros((8, 16), np.float32)
    weight[:, ::4] = 1
    with (
        mock.patch.dict(os.environ, SECATEUR_CACHE=str(place)),
        mock.patch.object(tuning, "machine_key", return_value="here"),
        mock.patch.object(tuning, "_measure", return_value=tuning.FormatChoice(packing, 2.0, 1.0)),
    ):
        choice = tuning.choose(weight, None, tokens=1)
    if choice.packing is not None:
        pack(weight, **choice.packing)
    return choice


def _tuning_seeds() -> Mapping[str, Case]:
    with tempfile.TemporaryDirectory() as place:
        _tuned(Path(place))
        return {"measured": folder(Path(place))}


def _read_tuning(place: Path) -> Any:
    before = folder(place)
    choice = _tuned(place)
    for name, data in before.items():
        (place / name).write_bytes(data)
    return choice, [isinstance(us, float) for us in (choice.dense_us, choice.sparse_us)]


def _errors(*names: str) -> tuple[type[Exception], ...]:
    from secateur.deploy.runner import ArtefactError
    from secateur.errors import SecateurError

    more: dict[str, tuple[type[Exception], ...]] = {"artefact": (ArtefactError,), "measured": (Measured,)}
    return (SecateurError, *(error for name in names for error in more[name]))


_RECIPES = {"long": {"recipe.yaml": RECIPE.encode()}, "short": {"recipe.yaml": SECOND_RECIPE.encode()}}


def _is_description(name: str) -> bool:
    return name == "artefact.json"


LIGHT = (
    Format("plan", _plan_seeds, _read_plan, _errors(), light=True, sample=300),
    Format("record", _record_seeds, _read_record, _errors(), light=True, sample=100),
    Format("recipe", lambda: _RECIPES, _read_recipe, _errors(), light=True, sample=60),
    Format(
        "layout", lambda: {"layout": {"layout.txt": LAYOUT.encode()}}, _read_layout, _errors(), light=True, sample=300
    ),
    Format("artefact", _artefact_seeds, _read_artefact, _errors("artefact"), _is_description, light=True, sample=150),
    Format("inputs", _artefact_seeds, _read_made_up, _errors("artefact"), _is_description, light=True, sample=150),
    *KERNELS,
)
HEAVY = (
    Format("rows", _row_seeds, _read_rows, _errors(), sample=150),
    Format("sentence-folder", _sentence_seeds, _read_sentence_folder, _errors(), sample=150),
    Format("results", _result_seeds, _read_results, _errors(), lambda name: name.endswith(".json"), sample=150),
    Format("latency-table", _table_seeds, _read_table, _errors("measured"), sample=150),
    Format("tuning-cache", _tuning_seeds, _read_tuning, _errors(), sample=100),
    Format("journal", _journal_seeds, _read_journal, _errors(), lambda name: name.endswith("journal.json"), sample=100),
)
