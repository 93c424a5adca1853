"""Recipes: what to do with a language model, as data that is checked; in YAML, an error names its line."""

import contextlib
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from secateur import repair
from secateur.errors import PlanError, shown
from secateur.schemas.yaml_reading import Loader, line_of, read_yaml
from secateur.select import NM, Unit, parse_pattern

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_MOST = 2**31 - 1
"""Largest count."""

NEEDS_NO_DATA = ("magnitude",)
"""Methods that read weights only."""


class Reconstruction(BaseModel):
    """How the kept weights of a block are tuned to the output of the dense block.

    passes: over the calibration windows.
    rate: the first step of Adam, relative to the root mean square of the kept weights of each matrix.
    windows: how many windows a step reads.
    bfloat16: whether products are in bfloat16; None: where the processor is faster in them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: float = Field(2.0, gt=0, le=100)
    rate: float = Field(0.01, gt=0, lt=1)
    windows: int = Field(1, ge=1, le=_MOST)
    bfloat16: bool | None = None


class Distillation(BaseModel):
    """How the whole model is tuned to the answers of the dense model after all blocks are pruned.

    passes: over the calibration windows.
    rate: the step of Adam.
    warmup: how many steps it takes to rise to that rate.
    windows: how many windows a step reads.
    hidden: the weight of the error of the hidden states beside that of the answers.
    bfloat16: whether products are in bfloat16; None: where the processor is faster in them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: float = Field(1.5, gt=0, le=100)
    rate: float = Field(5e-4, gt=0, lt=1)
    warmup: int = Field(4, ge=0, le=_MOST)
    windows: int = Field(1, ge=1, le=_MOST)
    hidden: float = Field(0.0, ge=0, allow_inf_nan=False)
    bfloat16: bool | None = None


class Allocation(BaseModel):
    """Each block has its own sparsity, by the outliers among its Wanda scores: see `secateur.budget.OWL`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    multiple: float = Field(5.0, gt=0, allow_inf_nan=False)
    spread: float = Field(0.08, gt=0, lt=0.5)


class Sensitivity(BaseModel):
    """Each weight matrix has its own sparsity, by what it costs in loss: see `secateur.torch.stream.sensitivity`.

    windows: how many calibration windows are read for it.
    spread: how far the sparsity of a matrix may lie from the stated one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int = Field(8, ge=1, le=_MOST)
    spread: float = Field(0.15, gt=0, lt=0.5)


STAGES: dict[str, type[BaseModel]] = {
    "owl": Allocation,
    "sensitivity": Sensitivity,
    "reconstruct": Reconstruction,
    "distil": Distillation,
}
"""What a recipe may ask for besides pruning, all of which reads calibration text; `true` takes the defaults."""


class Recipe(BaseModel):
    """One-shot pruning of a language model, block by block.

    model, output: folders of the dense and of the pruned model.
    task: such as CausalLM, for the class that opens the model; None: the class that its config names.
    criterion: a method of `secateur.repair`, or several such as `wanda+swaps`, each of which starts from what the
        method before it kept.
    options: keyword arguments of the last method.
    pattern, sparsity: what is pruned, and how much of it; an N:M pattern takes no sparsity.
    owl: give each block its own sparsity, by its outliers.
    sensitivity: give each matrix its own sparsity, by what it costs in loss.
    calibration: text files; equally many windows are drawn from each.
    text_column: where the text is in tables.
    samples: number of windows.
    context: tokens in a window.
    seed: of everything random.
    memory: the most bytes that a run may take; as text, such as 4GiB.
    reconstruct: tune every block to the output of the dense block.
    distil: tune the whole pruned model to the answers of the dense model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    output: Path | None = None
    task: str | None = None
    criterion: str = "sparsegpt"
    options: dict[str, Any] = Field(default_factory=dict)
    pattern: str = "element"
    sparsity: float | None = Field(None, ge=0, lt=1, validate_default=True)
    owl: Allocation | None = None
    sensitivity: Sensitivity | None = None
    calibration: list[Path] = Field(default_factory=list)
    text_column: str = "text"
    samples: int = Field(128, ge=1, le=_MOST)
    context: int = Field(512, ge=2, le=_MOST)
    seed: int = Field(0, ge=0, lt=2**63)
    memory: int | None = None
    reconstruct: Reconstruction | None = None
    distil: Distillation | None = None

    @field_validator("calibration", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return read_bytes(value) if isinstance(value, str) else value

    @field_validator(*STAGES, mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        find_method(value)
        return value

    @field_validator("options")
    @classmethod
    def _taken(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "criterion" in info.data:
            check_options(info.data["criterion"], value)
        return value

    @field_validator("pattern")
    @classmethod
    def _of_weights(cls, value: str) -> str:
        if isinstance(parse_pattern(value), Unit):
            raise ValueError(f"pattern {value} removes units; use element, 2:4 or a block such as 4x1")
        return value

    @field_validator("sparsity")
    @classmethod
    def _stated_once(cls, value: float | None, info: ValidationInfo) -> float | None:
        is_nm = _is_nm(info)
        if is_nm is not None and is_nm == (value is not None):
            advice = "says itself how much goes; leave out sparsity" if is_nm else "needs a sparsity, such as 0.5"
            raise ValueError(f"pattern {info.data['pattern']} {advice}")
        return value

    @field_validator("owl", "sensitivity")
    @classmethod
    def _dealt_once(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and _is_nm(info):
            raise ValueError(f"pattern {info.data['pattern']} takes the same everywhere; leave out {info.field_name}")
        if value is not None and info.data.get("owl"):
            raise ValueError("owl and sensitivity both deal out the sparsity; leave out one")
        return value

    @property
    def walks(self) -> bool:
        """Whether calibration text has to run through the blocks while these are pruned."""
        return self.criterion not in NEEDS_NO_DATA or self.reconstruct is not None

    @property
    def readers(self) -> list[str]:
        """The criterion and the stages that read calibration text."""
        stages = [name for name in STAGES if getattr(self, name) is not None]
        return stages if self.criterion in NEEDS_NO_DATA else [self.criterion, *stages]

    @property
    def stated_sparsity(self) -> float:
        """The sparsity; PlanError for an N:M pattern, which takes none."""
        if self.sparsity is None:
            raise PlanError(f"pattern {self.pattern} says itself how much goes")
        return self.sparsity

    def identity(self) -> dict[str, Any]:
        """Everything in the recipe that decides the result; model and text are not part of it."""
        return self.model_dump(mode="json", exclude={"model", "output", "memory", "calibration", "text_column", "task"})


def _is_nm(info: ValidationInfo) -> bool | None:
    """Whether the pattern is N:M, which is its own sparsity; None where there is no valid pattern."""
    return isinstance(parse_pattern(info.data["pattern"]), NM) if "pattern" in info.data else None


def find_method(criterion: str) -> Any:
    """The method of `secateur.repair` that a criterion names; of several, as in `ria+swaps`, the last, which starts
    from those before it. PlanError for a name or an order that does not exist.
    """
    known = sorted(n for n in repair.__all__ if n not in ("Gram", "by_criterion", "layer_loss", "prepare"))
    method: Any = None
    for name in criterion.split("+"):
        if name not in known:
            raise PlanError(f"no method {name!r} prunes block by block; there is {', '.join(known)}")
        next_method = getattr(repair, name)
        if method is not None:
            if "start" not in inspect.signature(next_method).parameters:
                raise PlanError(
                    f"{name} chooses by itself what stays, so nothing comes before it in {criterion}; alps, "
                    "least_squares and swaps go on from another method"
                )
            next_method = functools.partial(next_method, start=method)
        method = next_method
    return method


def check_options(criterion: str, options: dict[str, Any]) -> None:
    """PlanError unless the last method of a criterion has options of these names and types."""
    name = criterion.rpartition("+")[2]
    parameters = inspect.signature(find_method(name)).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("start", "fast")}
    for option, value in options.items():
        if option not in known:
            raise PlanError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        if isinstance(value, float) and not math.isfinite(value):
            raise PlanError(f"option {option} of {name}: input should be a finite number (got {value!r})")
        try:
            TypeAdapter(known[option]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise PlanError(f"option {option} of {name}: {_lowered(message)} (got {value!r})") from None


def read_option(text: str) -> tuple[str, Any]:
    """`damp=0.05` as a name and a value; PlanError for anything else."""
    name, mark, value = text.partition("=")
    if not mark or not name.strip() or not value.strip():
        raise PlanError(f"option {text!r} is not understood; write NAME=VALUE, such as damp=0.05")
    try:
        return name.strip(), yaml.load(value, Loader=Loader)
    except yaml.YAMLError:
        raise PlanError(f"option {text!r} has no value; write NAME=VALUE, such as damp=0.05") from None


def read_bytes(text: str) -> int:
    """`4GiB`, `800 MB` or a number of bytes as a number; PlanError for anything else."""
    number = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = int(float(number) * _BYTES[unit])
    except (ValueError, KeyError, OverflowError):
        raise PlanError(f"memory {text!r} is not understood; write 4GiB, 800MiB or 4GB") from None
    if value <= 0:
        raise PlanError(f"memory {text!r} is nothing; write 4GiB, 800MiB or 4GB")
    return value


def make_recipe(**values: Any) -> Recipe:
    """A recipe from keyword arguments; PlanError with one sentence when they do not make one."""
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise PlanError(_first(error)[1]) from None


def read_recipe(path: Path, **values: Any) -> Recipe:
    """A recipe from a YAML file, in which `values` replace entries. PlanError names the line of what is wrong.

    Paths in the file are relative to the folder of the file. A stage that `values` only switch on (True) stays as the
    file describes it.
    """
    data, node = read_yaml(path)
    replaced = {name: value for name, value in values.items() if not (value is True and data.get(name))}
    try:
        Recipe(**{**data, **replaced})
    except ValidationError as error:
        location, sentence = _first(error)
        where = "" if location and location[0] in replaced else f"{path}, line {line_of(node, location)}: "
        raise PlanError(f"{where}{sentence}") from None
    except TypeError as error:
        raise PlanError(f"{path}: {error}") from None
    for name in ("calibration", "output"):
        if name in data:
            data[name] = _beside(path, data[name])
    if isinstance(data.get("model"), str) and _exists(path.parent / data["model"]):
        data["model"] = str(path.parent / data["model"])
    return make_recipe(**{**data, **replaced})


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        return path.exists()
    return False


def _beside(path: Path, value: Any) -> Any:
    """A path, or each of a list, relative to the folder of `path`."""
    return [_beside(path, item) for item in value] if isinstance(value, list) else path.parent / value


def _first(error: ValidationError) -> tuple[tuple[Any, ...], str]:
    """Where the first error is (names and positions of entries, outermost first), and a sentence about it."""
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if isinstance(part, str | int))
    if first["type"] == "value_error":
        return location, first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = STAGES.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
        return location, f"{shown(location[-1])} is no entry of a recipe; there is {', '.join(known.model_fields)}"
    got = repr(first["input"])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    named = shown(location[-1]) if location else "the recipe"
    return location, f"{named}: {_lowered(first['msg'])} (got {got})"


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
