"""The one parser of JSON files: bounded in bytes, depth and numbers, checked against a schema; errors are sentences."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import ModelError, SecateurError

MOST_BYTES = 64 * 2**20
"""Largest JSON file that is read: a tokenizer of 250,000 tokens has about 20 MB."""
MOST_DEPTH = 64
"""Deepest nesting; Python's own parser overflows its stack at about 1,000."""
LARGEST = 2**63
"""Whole numbers from here on fit no array index."""
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape of half a surrogate pair."""


class Schema(BaseModel):
    """Base of the schemas: unknown keys are refused, types are not converted, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnySchema = TypeVar("AnySchema", bound=Schema)


def read_json(
    path: Path,
    *,
    error: type[SecateurError] = ModelError,
    remedy: str = "write it again",
    most_bytes: int = MOST_BYTES,
    infinite: bool = False,
) -> dict[str, Any]:
    """The object in a JSON file; raises as `read_value`, and where the file holds no object."""
    value = read_value(path, error=error, remedy=remedy, most_bytes=most_bytes, infinite=infinite)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds a {type(value).__name__}, not an object; {remedy}")
    return value


def read_value(
    path: Path,
    *,
    error: type[SecateurError] = ModelError,
    remedy: str = "write it again",
    most_bytes: int = MOST_BYTES,
    infinite: bool = False,
) -> Any:
    """What a JSON file holds.

    error: the class of what is raised. remedy: what the user can do, the end of the sentence.
    infinite: take NaN and infinities, which configurations of transformers hold.

    Raises `error` when the file is missing, too large or too deep, is no JSON, or holds NaN, an infinity, a number
    beyond 64 bits or a key twice.
    """
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise error(f"{path} has {size} bytes, which is more than the {most_bytes} that are read; {remedy}")
        return parse(path.read_text(encoding="utf-8"), infinite=infinite)
    except FileNotFoundError:
        raise error(f"there is no {path}; {remedy}") from None
    except (OSError, ValueError) as problem:
        if isinstance(problem, SecateurError):
            raise
        raise error(f"{path} is damaged: {_line(problem)}; {remedy}") from None


def read(
    path: Path, schema: type[AnySchema], *, error: type[SecateurError] = ModelError, remedy: str = "write it again"
) -> AnySchema:
    """A JSON file as its schema says; raises `error` with the first place that does not fit."""
    return check(read_json(path, error=error, remedy=remedy), schema, str(path), error=error, remedy=remedy)


def check(
    value: Any,
    schema: type[AnySchema],
    source: str,
    *,
    error: type[SecateurError] = ModelError,
    remedy: str = "write it again",
) -> AnySchema:
    """A parsed value as its schema says; raises `error` with the first place in `source` that does not fit."""
    try:
        return schema.model_validate(value, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        shown = repr(first.get("input"))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise error(f"{source} is damaged: {place} is {shown} ({first['msg'].lower()}); {remedy}") from None


def parse(text: str, *, infinite: bool = False) -> Any:
    """JSON text as a value; ValueError when it is too deep, or holds what JSON or 64 bits do not.

    infinite: take NaN and infinities all the same.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
        elif token[0] in "]}":
            depth -= 1
    constant = float if infinite else _no_constant
    value = json.loads(text, parse_constant=constant, parse_int=_whole, object_pairs_hook=_unique)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair, which is no character") from None
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -LARGEST <= (value := int(digits)) < LARGEST:
        raise ValueError(f"{digits[:24]} does not fit 64 bits")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _line(problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    return text if len(text) <= 200 else text[:197] + "..."
