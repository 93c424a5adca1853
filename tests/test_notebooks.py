"""The notebooks of docs/notebooks run, and print what they say."""

import json
import re

import pytest

from tests.write_notebooks import FOLDER, run

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.long
PATHS = sorted(FOLDER.glob("*.ipynb"))


def printed(notebook):
    """What each code cell prints, without its numbers, which depend on the machine."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = ("".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells)
    return [re.sub(r"[-+]?\d[\d.,e+-]*", "0", text) for text in texts]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_holds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = json.loads(path.read_text())
    assert any(printed(held))
    assert printed(run(held)) == printed(held)
