"""`secateur-record.json`: what was asked of a pruned model and what was measured of it.

Reports and model cards are made from records. A part that was not measured is left out. A record in a model's folder
holds no row of the user's data: examples go into the report only.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.schemas.reading import Schema
from secateur.schemas.results import Count, Machine, Positive, Share, Time

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Asked(Schema):
    """One wish and what came of it, in words. what: "speed on onnx, 1 x 128 tokens". asked, reached: "2x", "1.96x".
    is_met: null where nothing was demanded."""

    what: str
    asked: str
    reached: str
    is_met: bool | None = None


class Quality(Schema):
    """The saved model beside the dense one on the test rows. metric: name of the main metric. drop: how much worse the
    pruned model is. interval: of the drop, 95%. is_against_dense: the rows have no labels, and the dense model's
    answers take their place. divergence_name, divergence: from the dense model's outputs. flips: share of the rows
    whose answer is another one."""

    metric: str
    is_higher_better: bool = True
    dense: Finite
    pruned: Finite
    drop: Finite
    interval: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None
    rows: Positive
    is_against_dense: bool = False
    divergence_name: str = "KL"
    divergence: Finite | None = None
    flips: Share | None = None


class Form(Schema):
    """A language model, this one or the dense one, with its weights stored in one form. name: "dense q8_0", "this model
    float32". bytes: of the weights. value: loss for a token on the test rows, in nats. drop, interval, divergence,
    flips: beside the dense model as it is, as in the quality. prompt_speed, decode_speed: tokens a second that
    llama.cpp reads and writes."""

    name: str
    bytes: Count
    value: Finite
    drop: Finite | None = None
    interval: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None
    divergence: Finite | None = None
    flips: Share | None = None
    prompt_speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    decode_speed: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Stage(Schema):
    """Quality after one step of the work. name: "dense", "pruned", "fine-tuned", "healed", "fewer tokens"; "this model"
    where a saved model was evaluated."""

    name: str
    value: Finite
    divergence: Finite | None = None


class Sizes(Schema):
    """How large the model is. nonzero: parameters that are not zero. bytes, dense_bytes: of the weight files.
    macs_share: of the dense model's multiply-accumulates."""

    parameters: Count
    dense_parameters: Count | None = None
    nonzero: Count | None = None
    bytes: Count | None = None
    dense_bytes: Count | None = None
    macs_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Speed(Schema):
    """One model on one runtime, timed in turn with the dense one. what: of a language model the prompt or one token.
    length: 0 for a model that takes no tokens. low_ms, high_ms: quartiles."""

    runtime: str
    what: Literal["forward", "prompt", "token"] = "forward"
    batch: Positive
    length: Count
    threads: Positive
    ms: Time
    low_ms: Time | None = None
    high_ms: Time | None = None
    dense_ms: Time | None = None
    dense_low_ms: Time | None = None
    dense_high_ms: Time | None = None
    peak_bytes: Count | None = None


class FrontierPoint(Schema):
    """A model that was measured on the way. group: "chosen" by the search, "uniform" pruning, or the "dense" model.
    latency_share, parameters_share: of the dense model. value: of the main metric. before: the same before healing.
    is_result: whether this is the model of the folder."""

    name: str
    group: Literal["dense", "chosen", "uniform"]
    latency_share: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    parameters_share: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    value: Finite
    before: Finite | None = None
    is_result: bool = False


class Units(Schema):
    """How many units of an axis are left; none of an axis in a block that is gone. kind: "head", "kv", "ffn", ...
    block: number of the block in the dense model, from 0."""

    axis: str
    kind: str
    block: Count | None = None
    kept: Count
    total: Count

    @model_validator(mode="after")
    def _no_more_than_there_were(self) -> "Units":
        if self.kept > self.total:
            raise ValueError(f"axis {self.axis} keeps {self.kept} of {self.total}")
        return self


class Matrix(Schema):
    """A weight of a linear layer that is still there. name, block: in the dense model. shape: now. dense_shape: in the
    dense model. density: share that is not zero."""

    name: str
    block: Count | None = None
    shape: list[Count]
    dense_shape: list[Count] | None = None
    density: Share


class Curve(Schema):
    """A line of a chart: steps of healing, blocks of a pruning, steps of a schedule. x, y: what the numbers are, with
    their unit."""

    name: str
    x: str
    y: str
    points: list[Annotated[list[Finite], Field(min_length=2, max_length=2)]]


class Parity(Schema):
    """An artefact beside PyTorch on the same inputs. difference: the largest, in units of the output's scale. bound:
    what is permitted."""

    runtime: str
    difference: Finite
    bound: Finite
    inputs: Count | None = None


class Example(Schema):
    """A row on which the dense and the pruned model disagree. shown: the text, or a small image as a data URI.
    expected: the label, where there is one. divergence: of this row."""

    kind: Literal["text", "image", "other"]
    shown: str
    expected: str | None = None
    dense: str
    pruned: str
    divergence: Finite | None = None


class DataFile(Schema):
    """Data that was used. role: "training", "calibration", "test". name: the last part of its path. sha256: of the
    file; null for a folder or a hub data set."""

    role: str
    name: str
    rows: Count | None = None
    sha256: str | None = None


class Provenance(Schema):
    """How the model was made, so that somebody can make it again. command: one line. date: ISO 8601. versions: package
    -> version."""

    command: str = ""
    date: str = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: Machine | None = None
    data: list[DataFile] = Field(default_factory=list)


class Record(Schema):
    """The record of one model. title: a name for people. reading: the result in a sentence. notes: what a reader has to
    know, such as why no gain was measured."""

    format: Annotated[int, Field(ge=1, le=1)] = 1
    title: str
    task: str | None = None
    model_type: str | None = None
    reading: str = ""
    asked: list[Asked] = Field(default_factory=list)
    quality: Quality | None = None
    stages: list[Stage] = Field(default_factory=list)
    forms: list[Form] = Field(default_factory=list)
    sizes: Sizes | None = None
    speeds: list[Speed] = Field(default_factory=list)
    frontier: list[FrontierPoint] = Field(default_factory=list)
    units: list[Units] = Field(default_factory=list)
    matrices: list[Matrix] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    parities: list[Parity] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    provenance: Provenance | None = None
