"""The one parser of YAML files (recipes, training arguments): bounded in bytes, values and depth; errors name lines."""

import re
from pathlib import Path
from typing import Any

import yaml

from secateur.errors import PlanError

_MOST_BYTES, _MOST_VALUES, _MOST_DEPTH, _LONGEST = 2**20, 10_000, 32, 1000
"""Largest file, number of values, nesting and text of a recipe."""


class Loader(yaml.SafeLoader):
    """YAML without numbers in base 60, in which `2:4` would be 124."""


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"^[-+]?[0-9][0-9_]*$") if tag.endswith(":int") else form)
        for tag, form in resolvers
        if not tag.endswith(":float") or first not in "0123456789"
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?$"), list("0123456789")
)


def read_yaml(path: Path, what: str = "recipe") -> tuple[dict[str, Any], Any]:
    """The entries of a YAML file, and the node of its document; PlanError names the line of what is wrong.

    what: what the file should be, for errors.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise PlanError(f"{path} is no {what}: it has {size} bytes, which is more than {_MOST_BYTES}")
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=Loader)
        if node is not None:
            _check_size(path, node)
        data = yaml.load(text, Loader=Loader)
    except FileNotFoundError:
        raise PlanError(f"no {what} at {path}") from None
    except RecursionError:
        raise PlanError(f"{path} is no {what}: it is nested more than {_MOST_DEPTH} deep") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise PlanError(f"{path}, line {line}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PlanError(f"{path}, line {line}: {error.reason} (character {error.character:#x})") from None
    except PlanError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # a tag whose value is of another kind
        raise PlanError(f"{path} is no {what}: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise PlanError(f"{path} is no {what}: it holds {type(data).__name__}, not a list of names and values")
    return data, node


def _check_size(path: Path, node: Any, depth: int = 0, seen: dict[int, int] | None = None) -> int:
    """How many values a YAML node has, aliases counted each time; PlanError for too many of them, or too deep ones."""
    seen = {} if seen is None else seen
    if depth > _MOST_DEPTH:
        raise PlanError(f"{path}, line {node.start_mark.line + 1}: it is nested more than {_MOST_DEPTH} deep")
    if id(node) not in seen:
        if isinstance(node, yaml.ScalarNode) and ("\0" in node.value or len(node.value) > _LONGEST):
            what = f"text of more than {_LONGEST} characters" if len(node.value) > _LONGEST else "a zero byte"
            raise PlanError(f"{path}, line {node.start_mark.line + 1}: it has {what}")
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
        seen[id(node)] = 1 + sum(_check_size(path, part, depth + 1, seen) for part in inside)
        if seen[id(node)] > _MOST_VALUES:
            raise PlanError(f"{path}, line {node.start_mark.line + 1}: it has more than {_MOST_VALUES} values")
    return seen[id(node)]


def line_of(node: Any, location: tuple[Any, ...]) -> int:
    """Line, from 1, of the entry at a location in a YAML document, or of the innermost entry around it."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in location:
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
