"""Recipes: what to do with a language model, as data that is checked; in YAML, an error names its line."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator

from secateur.errors import PlanError
from secateur.select import NM, Unit, parse_pattern

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


NEEDS_NO_DATA = ("magnitude",)
"""Methods that look at weights only."""


class _Loader(yaml.SafeLoader):
    """YAML without numbers to the base of 60, for which `2:4` would be 124."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"^[-+]?[0-9][0-9_]*$") if tag.endswith(":int") else form)
        for tag, form in found
        if not tag.endswith(":float") or first not in "0123456789"
    ]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"), list("0123456789")
)


class Reconstruction(BaseModel):
    """How the kept weights of a block are tuned on the dense model's output: passes over the calibration windows, and
    the step of Adam relative to the mean magnitude of the kept weights of each matrix.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: float = Field(2.0, gt=0, le=100)
    rate: float = Field(0.01, gt=0, lt=1)
    windows: int = Field(1, ge=1)
    """Windows a step."""
    bfloat16: bool | None = None
    """Products in bfloat16; by default where the processor is faster in them."""


class Distillation(BaseModel):
    """How the whole model is tuned on the dense model's answers when all blocks are pruned: passes over the calibration
    windows; the step of Adam, and how many steps it takes to rise to it; windows a step; the weight of the hidden
    states beside the answers; bfloat16 products, by default where the processor is faster in them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: float = Field(1.5, gt=0, le=100)
    rate: float = Field(5e-4, gt=0, lt=1)
    warmup: int = Field(4, ge=0)
    windows: int = Field(1, ge=1)
    hidden: float = Field(0.0, ge=0)
    bfloat16: bool | None = None


class Allocation(BaseModel):
    """Blocks lose differently much, by the outliers among their Wanda scores: see `secateur.budget.OWL`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    multiple: float = Field(5.0, gt=0)
    spread: float = Field(0.08, gt=0, lt=0.5)


class Sensitivity(BaseModel):
    """Each weight matrix loses as much as the loss of the model bears: see `secateur.torch.stream.sensitivity`.

    spread: how far the sparsity of a matrix may lie from the stated one.
    windows: how many calibration windows are looked at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: int = Field(8, ge=1)
    spread: float = Field(0.15, gt=0, lt=0.5)


STAGES: dict[str, type[BaseModel]] = {
    "owl": Allocation,
    "sensitivity": Sensitivity,
    "reconstruct": Reconstruction,
    "distil": Distillation,
}
"""What a recipe may ask for beside pruning, all of which reads calibration text; `true` takes the defaults."""


class Recipe(BaseModel):
    """One-shot pruning of a language model, block by block.

    criterion: a method of `secateur.repair`, or several such as `wanda+swaps`, of which each begins with what the one
    before it kept; options: keyword arguments of the last.
    pattern, sparsity: as everywhere; N:M says itself how much goes.
    owl: spread the sparsity over the blocks by their outliers. sensitivity: over the matrices, by what the loss bears.
    calibration: text files; windows are drawn from all of them in turn. samples: windows; context: tokens in each.
    memory: the most that a run may take, such as 4GiB; reconstruct: tune every block on the dense model's output;
    distil: tune the whole model, once it is pruned, on the dense model's answers.
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
    samples: int = Field(128, ge=1)
    context: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
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
        fixed = _fixed(info)
        if fixed is not None and fixed == (value is not None):
            says = "says itself how much goes; leave out sparsity" if fixed else "needs a sparsity, such as 0.5"
            raise ValueError(f"pattern {info.data['pattern']} {says}")
        return value

    @field_validator("owl", "sensitivity")
    @classmethod
    def _dealt_once(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and _fixed(info):
            raise ValueError(f"pattern {info.data['pattern']} takes the same everywhere; leave out {info.field_name}")
        if value is not None and info.data.get("owl"):
            raise ValueError("owl and sensitivity both deal out the sparsity; leave out one")
        return value

    @property
    def walks(self) -> bool:
        """Whether calibration text has to run through the blocks while they are pruned."""
        return self.criterion not in NEEDS_NO_DATA or self.reconstruct is not None

    @property
    def readers(self) -> list[str]:
        """What of the recipe reads calibration text."""
        stages = [name for name in STAGES if getattr(self, name) is not None]
        return stages if self.criterion in NEEDS_NO_DATA else [self.criterion, *stages]

    def identity(self) -> dict[str, Any]:
        """What decides the result, but for model and text."""
        return self.model_dump(mode="json", exclude={"model", "output", "memory", "calibration", "text_column", "task"})


def _fixed(info: ValidationInfo) -> bool | None:
    """Whether the pattern says itself how much goes; None where it is wrong."""
    return isinstance(parse_pattern(info.data["pattern"]), NM) if "pattern" in info.data else None


def find_method(criterion: str) -> Any:
    """The method of `secateur.repair` that a criterion names; of several, as in `ria+swaps`, the last, which starts
    with those before it.
    """
    from secateur import repair

    known = sorted(n for n in repair.__all__ if n not in ("Gram", "by_criterion", "layer_loss", "prepare"))
    method: Any = None
    for name in criterion.split("+"):
        if name not in known:
            raise PlanError(f"no method {name!r} prunes block by block; there is {', '.join(known)}")
        found = getattr(repair, name)
        if method is not None:
            if "start" not in inspect.signature(found).parameters:
                raise PlanError(
                    f"{name} chooses by itself what stays, so nothing comes before it in {criterion}; alps, "
                    "least_squares and swaps go on from another method"
                )
            found = functools.partial(found, start=method)
        method = found
    return method


def check_options(criterion: str, options: dict[str, Any]) -> None:
    """PlanError unless the last method of a criterion has options of these names and types."""
    name = criterion.rpartition("+")[2]
    found = inspect.signature(find_method(name)).parameters.values()
    known = {p.name: p.annotation for p in found if p.kind is p.KEYWORD_ONLY and p.name not in ("start", "fast")}
    for option, value in options.items():
        if option not in known:
            raise PlanError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
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
        return name.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise PlanError(f"option {text!r} has no value; write NAME=VALUE, such as damp=0.05") from None


def read_bytes(text: str) -> int:
    """`4GiB`, `800 MB` or a number of bytes as a number; PlanError for anything else."""
    number = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        value = int(float(number) * _UNITS[unit])
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
    """A recipe from a YAML file; `values` win over what it says. PlanError names the line of what is wrong.

    Paths in the file are relative to the folder of the file. A stage that `values` only switch on (True) is as the file
    describes it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise PlanError(f"no recipe at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PlanError(f"{path}, line {line}: {error.problem}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} is no recipe: it holds {type(data).__name__}, not a list of names and values")
    given = {name: value for name, value in values.items() if not (value is True and data.get(name))}
    try:
        Recipe(**{**data, **given})
    except ValidationError as error:
        place, sentence = _first(error)
        where = "" if place and place[0] in given else f"{path}, line {_line(node, place)}: "
        raise PlanError(f"{where}{sentence}") from None
    except TypeError as error:
        raise PlanError(f"{path}: {error}") from None
    for name in ("calibration", "output"):
        if name in data:
            data[name] = _beside(path, data[name])
    if isinstance(data.get("model"), str) and (path.parent / data["model"]).exists():
        data["model"] = str(path.parent / data["model"])
    return make_recipe(**{**data, **given})


def _beside(path: Path, value: Any) -> Any:
    return [_beside(path, item) for item in value] if isinstance(value, list) else path.parent / value


def _first(error: ValidationError) -> tuple[tuple[Any, ...], str]:
    """Where the first error is, and what is wrong in a sentence."""
    found = error.errors()[0]
    place = tuple(part for part in found["loc"] if isinstance(part, str | int))
    if found["type"] == "value_error":
        return place, found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        known = STAGES.get(str(place[0]), Recipe) if len(place) > 1 else Recipe
        return place, f"{place[-1]!r} is no entry of a recipe; there is {', '.join(known.model_fields)}"
    return place, f"{place[-1]!r}: {_lowered(found['msg'])} (got {found['input']!r})"


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _line(node: Any, place: tuple[Any, ...]) -> int:
    """Line of an entry of a YAML document, from 1."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
