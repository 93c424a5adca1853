"""What the files of a model's folder say of it, for its card: how it opens, what was removed, what it can show."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.schemas.model_folder import read_config
from secateur.schemas.plan import PlanFile
from secateur.schemas.reading import read, read_json
from secateur.schemas.record import Units

PICTURES = {"frontier.png": "Quality and time of every model that was measured on the way"}
"""Pictures that a card shows where they lie in the folder, and what each shows."""
_BLOCK = re.compile(r"(?:^|\.)L(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """The facts of a folder.

    opens: "stock" models open with transformers alone, "shrunk" ones with secateur imported, "plain" ones are no
        models of transformers.
    reason: why a shrunk model needs secateur, as the end of a sentence.
    architecture: the class of the model, where it is a name in Python.
    has_code: the class comes with the model, as code.
    has_tokenizer, has_processor, is_sentence: whether the folder has a tokenizer, a processor of images or sounds, and
        the modules of sentence-transformers.
    steps: what explains each decision of the plan.
    units: kept units of each axis by the plan. masked: number of parameters with single zeros.
    pictures: names of pictures in the folder.
    """

    opens: Literal["stock", "shrunk", "plain"] = "stock"
    reason: str = ""
    architecture: str | None = None
    model_type: str | None = None
    has_code: bool = False
    has_tokenizer: bool = False
    has_processor: bool = False
    is_sentence: bool = False
    steps: tuple[Mapping[str, Any], ...] = ()
    units: tuple[Units, ...] = ()
    masked: int = 0
    pictures: tuple[str, ...] = field(default=())


def facts_of(folder: Path) -> Facts:
    """The facts of a folder; ModelError when its `config.json` or its plan is damaged."""
    is_plain = (folder / "secateur.json").is_file()
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() and not is_plain else {}
    described = config.get("quantization_config")
    described = described if isinstance(described, dict) and described.get("quant_method") == "secateur" else None
    named = config.get("architectures") or [None]
    steps, units, masked = _plan(folder)
    steps = steps or _recipe(folder)
    return Facts(
        opens="plain" if is_plain else "stock" if described is None else "shrunk",
        reason="" if described is None else _reason(described),
        architecture=named[0] if isinstance(named[0], str) and named[0].isidentifier() else None,
        model_type=config.get("model_type") if isinstance(config.get("model_type"), str) else None,
        has_code="auto_map" in config,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        has_processor=any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")),
        is_sentence=(folder / "modules.json").is_file(),
        steps=steps,
        units=units,
        masked=masked,
        pictures=tuple(name for name in PICTURES if (folder / name).is_file()),
    )


def _reason(described: Mapping[str, Any]) -> str:
    """Why a model needs secateur, from the manifest in its config."""
    if described.get("tokens") is not None:
        return "it runs with a schedule of tokens"
    if described.get("changes"):
        return "the numbers of its config cannot express its sizes"
    return "its zeros are stored packed"


def _plan(folder: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Units, ...], int]:
    """What the plan of the folder says: see `Facts`."""
    if not (folder / "plan.json").is_file():
        return (), (), 0
    plan = read(folder / "plan.json", PlanFile)
    origin = plan.provenance
    steps: Sequence[Any] = origin["steps"] if isinstance(origin.get("steps"), list) else [origin] if origin else []
    units = [
        Units(axis=name, kind=name.rpartition(".")[2], block=block_of(name), kept=len(kept.units), total=kept.of)
        for name, kept in plan.keep.items()
        if len(kept.units) <= kept.of
    ]
    return tuple(step for step in steps if isinstance(step, dict)), tuple(units), len(plan.masks)


def _recipe(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """What explains a model that was pruned block by block."""
    if not (folder / "pruned.json").is_file():
        return ()
    recipe = read_json(folder / "pruned.json").get("recipe")
    if not isinstance(recipe, dict):
        return ()
    return ({"criterion": recipe.get("criterion"), "pattern": recipe.get("pattern"), "budget": recipe.get("sparsity")},)


def block_of(axis: str) -> int | None:
    """The number of the block that an axis belongs to, from its name such as `L0.head`."""
    found = _BLOCK.search(axis)
    return None if found is None else int(found[1])
