"""The page of the files: what is made from a schema, and that the committed page is the made one."""

import importlib
import sys
from pathlib import Path

import pytest

from secateur.schemas import page
from tests.schemas import write_format_page

EXAMPLE = '''\
"""`example.json`: an example."""

from typing import Annotated, Any, Literal

from pydantic import Field

from secateur.schemas.reading import Schema

Count = Annotated[int, Field(ge=0, le=9)]


class Kept(Schema):
    """What stays of one axis. of: how many
    units it had. first, last: its ends."""

    of: Count
    first: int | None = None
    last: float = Field(1.5, gt=0)


class Empty(Schema):
    """Nothing."""


class ExampleFile(Schema):
    """The whole.

    keep: axis -> what stays; see of: it.
    """

    format: Annotated[int, Field(ge=1, le=1)]
    kind: Literal["a", "b"]
    keep: dict[str, Kept]
    names: list[Annotated[str, Field(pattern="^a|b$", max_length=4)]] = Field(default_factory=list)
    pair: tuple[int, bool] = (1, True)
    three: Annotated[list[int], Field(min_length=3, max_length=3)] = [1, 2, 3]
    empty: Empty = Field(default_factory=Empty)
    more: dict[str, Any] = Field(default_factory=dict, description="whatever else")
'''
EXPECTED = """\
## Example schema

`example.json`: an example.

Version: `format` is `1`.

Read by nobody yet.

### ExampleFile

The whole.

| field | type | default | meaning |
|---|---|---|---|
| `format` | `1` | needed |  |
| `kind` | `'a'` or `'b'` | needed |  |
| `keep` | object of text to (`Kept`) | needed | axis -> what stays; see of: it |
| `names` | list of (text, at most 4 long and of the form `^a\\|b$`) | `[]` |  |
| `pair` | list of 2: whole number, true or false | `(1, True)` |  |
| `three` | list of (whole number), 3 long | `[1, 2, 3]` |  |
| `empty` | `Empty` | `Empty()` |  |
| `more` | object of text to (anything) | `{}` | whatever else |

### Kept

What stays of one axis.

| field | type | default | meaning |
|---|---|---|---|
| `of` | whole number, at least 0 and at most 9 | needed | how many units it had |
| `first` | whole number or null | `null` | its ends |
| `last` | number, above 0 | `1.5` | its ends |

### Empty

Nothing.

No entries."""


@pytest.fixture
def example(tmp_path, monkeypatch):
    (tmp_path / "example_schema.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("example_schema")
    del sys.modules["example_schema"]


def test_a_schema_as_a_section(example):
    assert page.section(example) == EXPECTED


def test_readers_are_those_who_import(tmp_path, monkeypatch, example):
    monkeypatch.setattr(page, "_SOURCE", tmp_path / "secateur")
    (tmp_path / "secateur" / "torch").mkdir(parents=True)
    (tmp_path / "secateur" / "a.py").write_text("from secateur.schemas.example_schema import Kept\n")
    (tmp_path / "secateur" / "torch" / "b.py").write_text("from secateur.schemas import example_schema, plan\n")
    (tmp_path / "secateur" / "c.py").write_text("from secateur.schemas.example_schema_two import Kept\n")
    assert page.readers_of(example) == ["secateur.a", "secateur.torch.b"]


def test_every_format_has_a_schema_and_a_docstring():
    for module in write_format_page.formats():
        assert page.schemas_of(module), module.__name__
        assert (module.__doc__ or "").strip().endswith("."), module.__name__


def test_the_committed_page_is_the_made_one():
    made = write_format_page.render()
    assert write_format_page.PAGE.read_text(encoding="utf-8") == made, (
        "a schema has changed: run `python -m tests.schemas.write_format_page`"
    )
    for named in ("native/src/blob.h", "native/include/secateur/steps.h"):
        assert named in made
        assert (Path(__file__).parents[2] / named).is_file()


def test_names_of_packed_zeros():
    pytest.importorskip("torch")
    from secateur.torch.files.zero_packing import BITS, VALUES

    assert f"`NAME{BITS}`" in write_format_page.render()
    assert f"`NAME{VALUES}`" in write_format_page.render()
