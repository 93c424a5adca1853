"""The journal of a run: what is read back, and which damage is one sentence."""

import json

import pytest

from secateur.errors import ModelError
from secateur.files import claimed
from secateur.torch.stream.journal import Journal, Workspace, earlier, partial_folder

LAYER = {"name": "a.weight", "weights": 4, "zeros": 2, "error": None, "notes": ["x"]}
BLOCK = {
    "path": "a",
    "file": "model-00001-of-00002.safetensors",
    "error": 0.5,
    "tuned": [0.5, 0.25],
    "layers": [LAYER],
    "sha256": "00",
    "seconds": 1.0,
}
SETTINGS = {"batch": 1, "on_disk": True, "expected": 9, "threads": 2, "bfloat16": False, "sparsity": {"a.weight": 0.5}}


@pytest.fixture
def path(tmp_path):
    journal = Journal({"recipe": {}}, SETTINGS, [BLOCK], {"dense-0-1": [["t"], 2**32 - 1]}, [1.0, 0.5])
    with claimed(tmp_path / "out") as claim:
        work = Workspace(tmp_path / "out", journal, claim)
        work.folder.mkdir()
        work.commit()
    assert earlier(tmp_path / "out") == journal
    return work.folder / "journal.json"


def test_a_run_that_had_not_begun(tmp_path):
    assert earlier(tmp_path / "out") is None
    partial_folder(tmp_path / "out").mkdir()
    with claimed(tmp_path / "out") as claim:
        Workspace(tmp_path / "out", Journal({}), claim).commit()
    assert earlier(tmp_path / "out") == Journal({})


@pytest.mark.parametrize(
    "change",
    [
        {"identity": 3},
        {"settings": {**SETTINGS, "threads": -1}},
        {"settings": {"batch": 1}},
        {"settings": [1]},
        {"blocks": [{**BLOCK, "file": "../../x"}]},
        {"blocks": [{**BLOCK, "file": "a\0b"}]},
        {"blocks": [{**BLOCK, "layers": [{**LAYER, "weights": "4"}]}]},
        {"blocks": [3]},
        {"blocks": {"file": "x"}},
        {"states": {"../x": [["t"], 1]}},
        {"states": {"dense-0-1": 3}},
        {"distilled": [1.0]},
        {"finished": "no"},
        {"more": 1},
        {"format": 2},
        {"format": [1]},
    ],
)
def test_a_journal_with_wrong_values(change, path):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=r"delete .*\.out\.partial to start over") as caught:
        earlier(path.parent.with_name("out"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, '{"format": 1' + "0" * 5000 + "}"])
def test_a_journal_that_is_no_object(text, path):
    path.write_text(text)
    with pytest.raises(ModelError, match=r"delete .*\.out\.partial to start over"):
        earlier(path.parent.with_name("out"))
