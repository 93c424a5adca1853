"""runtime.json, the manifest of a compiled model that `secateur.runtime.save` has written; and the file in which
`secateur.runtime.compile` keeps its measurements."""

from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from secateur.schemas.model_folder import TokensEntry
from secateur.schemas.reading import Schema

MOST = 2**31 - 1
"""Largest size or number of a value: the kernels count in 32 bits."""

Size = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Length = Annotated[int, Field(ge=0, le=64)]
"""Of a tuple that a block returns."""
Name = Annotated[str, Field(max_length=1000)]
Path = Annotated[str, Field(min_length=1, max_length=1000)]
Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
Three = Annotated[list[Count], Field(min_length=3, max_length=3)]
Variants = Annotated[list[Size], Field(min_length=1, max_length=1000)]
Epsilon = Annotated[FiniteFloat, Field(ge=0)]


class Manifest(Schema):
    """The whole manifest; the entries of `one_calls`, `chains` and `decoders` have schemas of their own.

    tokens: the schedule of tokens, `TokensEntry` of a model folder; left out for a model that has none.
    """

    version: Literal[2]
    class_: Name = Field(alias="class")
    packed: dict[Name, Activation]
    by_tokens: dict[Name, Variants] = Field(default_factory=dict)
    one_calls: dict[Name, Any] = Field(default_factory=dict)
    chains: dict[Name, Any] = Field(default_factory=dict)
    decoders: dict[Name, Any] = Field(default_factory=dict)
    identities: list[Path]
    aliases: dict[Path, Path]
    changes: dict[str, Any] | None = None
    tokens: TokensEntry | None = None


class LinearAddNorm(Schema):
    """norm(linear(x) + residual); a manifest without a kind holds it as well."""

    kind: Literal["linear"] = "linear"
    linear: Path
    names: list[Name]
    x: Name
    residual: Name | None = None
    norm: Name = "none"
    scale: Name = ""
    shift: Name = ""
    epsilon: Epsilon = 0.0


class Gated(Schema):
    """down(activation(gate(x)) * up(x))."""

    kind: Literal["gated"]
    gate: Path
    up: Path
    down: Name
    activation: Name
    names: list[Name]
    x: Name


class PrimitiveNorm(Schema):
    """A norm in single operations."""

    kind: Literal["norm"]
    norm: Name
    names: list[Name]
    x: Name
    scale: Name = ""
    epsilon: Epsilon = 0.0


FUSIONS: dict[str, type[Schema]] = {"linear": LinearAddNorm, "gated": Gated, "norm": PrimitiveNorm}


class Step(Schema):
    """One step of a chain or of a decoder's block."""

    kind: Annotated[int, Field(ge=0, le=4)]
    reads: Annotated[list[Annotated[int, Field(ge=-1, le=MOST)]], Field(min_length=1, max_length=3)]
    first: Three
    heads: Three
    weight: Path | None = None
    value: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    bias: Path | None = None
    scale: Path | None = None
    shift: Path | None = None
    activation: Annotated[int, Field(ge=0, le=4)] = 0
    norm: Annotated[int, Field(ge=0, le=2)] = 0
    number: FiniteFloat = 0.0
    rows: Count = 0


Steps = Annotated[list[Step], Field(min_length=1, max_length=2**20)]


class BlockForm(Schema):
    """How a block of a chain is called."""

    names: list[Name]
    x: Path
    mask: Name
    tensors: list[Name]
    constants: dict[Name, bool | int | FiniteFloat | str | None]
    given: Length


class Chain(Schema):
    """A chain of blocks."""

    blocks: Annotated[list[Path], Field(min_length=1)]
    form: BlockForm
    steps: Steps
    heads: Count
    width: Size
    rows: Size
    without_mask: bool
    shown: Count


class DecoderForm(Schema):
    """How a block of a decoder is called."""

    names: list[Name]
    x: Path
    mask: Name
    turns: Name
    given: Length


class Decoder(Schema):
    """A block that computes one token at a time."""

    form: DecoderForm
    steps: Steps
    attention: Name
    width: Size


class FormatChoice(Schema):
    """How a layer of some shape and density runs on this machine."""

    packing: dict[Name, Count | Name] | None
    dense_us: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    sparse_us: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    possible: bool = True


class Measurements(Schema):
    """The measurements of every machine that has used a folder: machine -> layer -> choice."""

    version: int
    machines: dict[str, dict[str, FormatChoice]]

    def as_data(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The measurements as plain values."""
        return {name: {key: c.model_dump() for key, c in known.items()} for name, known in self.machines.items()}
