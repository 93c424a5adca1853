"""The schemas as a page of the documentation: a table for each, made from types, limits, defaults and docstrings.

A docstring describes fields as `name: text`, or several at once as `name, name: text`.
"""

import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

VERSIONS = ("format", "version")
"""Fields that hold the version of a file."""
_SOURCE = Path(__file__).parents[1]
_NAMES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    Path: "path",
    dict: "object",
    list: "list",
    tuple: "list",
}
_LIMITS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "multiple_of": "a multiple of {}",
}
_LIMITS |= {"min_length": "at least {} long", "max_length": "at most {} long", "pattern": "of the form `{}`"}


def section(module: ModuleType, *, models: Iterable[type[BaseModel]] | None = None, readers: bool = True) -> str:
    """The Markdown section of a format.

    module: its docstring says which file it is and what it is for.
    models: the schemas to show; by default all that the module defines, the one of the whole file first.
    readers: also list the modules that import it.
    """
    shown = list(schemas_of(module) if models is None else models)
    about = " ".join((module.__doc__ or "").split())
    name = module.__name__.rpartition(".")[2].replace("_", " ")
    parts = [f"## {name.capitalize()}", about]
    version = next((text for model in shown for text in _versions(model)), None)
    if version is not None:
        parts.append(version)
    if readers:
        read_by = readers_of(module)
        parts.append(f"Read by {', '.join(f'`{reader}`' for reader in read_by)}." if read_by else "Read by nobody yet.")
    return "\n\n".join([*parts, *map(table, shown)])


def schemas_of(module: ModuleType) -> list[type[BaseModel]]:
    """The schemas that a module defines; those that no other one of them holds come first."""
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == module.__name__
    ]
    held = {inner for model in own for field in model.model_fields.values() for inner in _models(field.annotation)}
    return sorted((model for model in own if model.model_fields or model in held), key=lambda model: model in held)


def readers_of(module: ModuleType) -> list[str]:
    """The modules of secateur that import a module of schemas."""
    name = module.__name__.rpartition(".")[2]
    use = re.compile(rf"\bsecateur\.schemas(?:\.{name}\b| import [^\n]*\b{name}\b)")
    files = sorted(file for file in _SOURCE.rglob("*.py") if use.search(file.read_text(encoding="utf-8")))
    return [".".join(file.relative_to(_SOURCE.parent).with_suffix("").parts) for file in files]


def table(model: type[BaseModel]) -> str:
    """A schema as a Markdown table: field, type with limits, default, meaning."""
    about, meanings = describe(model)
    lines = [f"### {model.__name__}", ""]
    if about:
        lines += [about, ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"] if model.model_fields else ["No entries."]
    for name, field in model.model_fields.items():
        default = "needed" if field.is_required() else f"`{_default(field)}`"
        meaning = field.description or meanings.get(name, "")
        lines.append(f"| `{name}` | {_cell(type_of(field))} | {_cell(default)} | {_cell(meaning)} |")
    if model.model_config.get("extra") != "forbid":
        lines += ["", "Other entries are allowed, and not read."]
    return "\n".join(lines)


def describe(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """What the docstring of a schema says about the whole, and about each of its fields."""
    text = " ".join((model.__dict__.get("__doc__") or "").split())
    one = "|".join(sorted(map(re.escape, model.model_fields), key=len, reverse=True)) or "$^"
    marks = list(re.finditer(rf"(?<![\w`.])((?:{one})(?:, (?:{one}))*): ", text))
    meanings = {}
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends[: len(marks)], strict=True):
        for name in mark[1].split(", "):
            meanings[name] = text[mark.end() : end].strip().rstrip(".")
    return text[: marks[0].start()].strip() if marks else text, meanings


def type_of(field: FieldInfo) -> str:
    """The type of a field in words, with its limits."""
    return _limited(_words(field.annotation), field.metadata)


def _words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [m for entry in inside[1:] for m in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
        return _limited(_words(inside[0]), limits)
    if origin is Literal:
        return " or ".join(f"`{value!r}`" if isinstance(value, str) else f"`{value}`" for value in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, inside))
    if origin in (list, set, frozenset) or (origin is tuple and inside[-1:] == (...,)):
        return f"list of ({_words(inside[0])})"
    if origin is tuple:
        return f"list of {len(inside)}: {', '.join(map(_words, inside))}"
    if isinstance(origin, type) and issubclass(origin, typing.Mapping):
        return f"object of {_words(inside[0])} to ({_words(inside[1])})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{annotation.__name__}`"
    return _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _limited(words: str, metadata: Iterable[Any]) -> str:
    found = {
        name: getattr(entry, name) for entry in metadata for name in _LIMITS if getattr(entry, name, None) is not None
    }
    if "ge" in found and found["ge"] == found.get("le"):
        return f"`{found['ge']}`"
    if "min_length" in found and found["min_length"] == found.get("max_length"):
        words = f"{words}, {found.pop('min_length')} long"
        del found["max_length"]
    limits = [form.format(found[name]) for name, form in _LIMITS.items() if name in found]
    return f"{words}, {' and '.join(limits)}" if limits else words


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The schemas inside a type."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in get_args(annotation) for model in _models(part)]


def _versions(model: type[BaseModel]) -> list[str]:
    return [
        f"Version: `{name}` is {type_of(field)}."
        for name, field in model.model_fields.items()
        if name in VERSIONS and "`" in type_of(field)
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if field.default_factory is not None else field.default
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}()" if not value.model_fields_set else repr(value)
    known = {None: "null", True: "true", False: "false"}
    return known[value] if value is None or isinstance(value, bool) else repr(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
