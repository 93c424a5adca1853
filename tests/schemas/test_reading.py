"""The one parser of JSON files: what it refuses, and in which words."""

import pytest

from secateur.errors import PlanError
from secateur.schemas.reading import MOST_DEPTH, Schema, check, read, read_json


class Small(Schema):
    """Two numbers."""

    count: int
    names: list[str]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ', "is damaged: Expecting value"),
        ("[1]", "it holds a list, not an object"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "-Infinity is no number of JSON"),
        ('{"a": 9223372036854775808}', "9223372036854775808 does not fit 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "does not fit 64 bits"),
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ('{"a": ' + "[" * 100_000, f"it is nested more than {MOST_DEPTH} deep"),
    ],
)
def test_text_that_is_refused(text, reason, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PlanError, match=reason) as error:
        read_json(tmp_path / "a.json", error=PlanError, remedy="prune again")
    assert str(error.value).endswith("; prune again")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_brackets_in_strings_are_no_depth(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "' + "[" * 200 + '\\""}')
    assert read_json(tmp_path / "a.json") == {"a": "[" * 200 + '"'}


def test_files_that_are_missing_large_or_no_text(tmp_path):
    with pytest.raises(ValueError, match="there is no .*; write it again"):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="is damaged: 'utf-8' codec"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="has 10 bytes, which is more than the 5 that are read"):
        read_json(tmp_path / "a.json", most_bytes=5)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "count is .*field required"),
        ({"count": "3", "names": []}, "count is '3' .*valid integer"),
        ({"count": True, "names": []}, "count is True"),
        ({"count": 3, "names": [], "more": 1}, "more is 1 .*not permitted"),
        ({"count": 3, "names": ["a", 4]}, r"names\.1 is 4"),
    ],
)
def test_values_that_do_not_fit_their_schema(value, reason):
    with pytest.raises(PlanError, match=f"plan.json is damaged: {reason}"):
        check(value, Small, "plan.json", error=PlanError)


def test_a_file_by_its_schema(tmp_path):
    (tmp_path / "a.json").write_text('{"count": 3, "names": ["b"]}')
    assert read(tmp_path / "a.json", Small) == Small(count=3, names=["b"])
