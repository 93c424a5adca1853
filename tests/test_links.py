"""Every relative link of the README and of docs/ leads to a file that there is, and to a heading in it; what the site
changes in a page."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += [ROOT / "benchmarks/results/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that GitHub and the site give to headings."""
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading) for heading in HEADING.findall(FENCE.sub("", text)))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in plain}


def broken(text, folder, here):
    """The links in the Markdown of a page that lead nowhere. here: the anchors of the page itself."""
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path
        is_notebook = target.suffix == ".md" and target.with_suffix(".ipynb").exists()  # the site makes a page of it
        found = not path or target.exists() or is_notebook
        if not found or (anchor and anchor not in (anchors(target.read_text()) if path else here)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    assert list(broken(text, page.parent, anchors(text))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_of_notebooks_lead_somewhere(path):
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert list(broken(text, path.parent, anchors(text))) == []


def test_a_wrong_file_and_a_wrong_heading_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Some `code` here\n```sh\n# no heading\n```\n")
    text = "[a](other.md) [b](other.md#some-code-here) [c](#own) [d](https://x.y) `[e](none.md)`"
    assert list(broken(text, tmp_path, {"own"})) == []
    wrong = "[a](none.md) [b](other.md#no-heading) [c](#else)"
    assert list(broken(wrong, tmp_path, {"own"})) == ["none.md", "other.md#no-heading", "#else"]


def test_the_navigation_of_the_site_names_every_page():
    named = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    pages |= {str(path.relative_to(ROOT / "docs").with_suffix(".md")) for path in NOTEBOOKS}
    assert named == pages


def of_site(name):
    """A module of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_links_out_of_the_docs_lead_to_the_repository():
    text = "[a](../README.md#try) [b](../benchmarks/results) [c](pruning.md) [d](pictures/zeros.svg)"
    assert of_site("hooks").leave_docs(text, "index.md", ROOT, "https://x.y") == (
        "[a](https://x.y/blob/main/README.md#try) [b](https://x.y/tree/main/benchmarks/results) [c](pruning.md) "
        "[d](pictures/zeros.svg)"
    )
    deeper = "[a](../pruning.md) [b](../../Makefile)"
    assert of_site("hooks").leave_docs(deeper, "notebooks/x.md", ROOT, "https://x.y") == (
        "[a](../pruning.md) [b](https://x.y/blob/main/Makefile)"
    )


def test_a_notebook_becomes_a_page_with_what_it_printed():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
        {"cell_type": "code", "source": ["x = 2"], "outputs": []},
    ]
    assert of_site("hooks").as_markdown({"cells": cells}, "x.ipynb") == (
        "# Title\ntext\n\n[The notebook](x.ipynb) itself opens in Jupyter.\n\n"
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n"
    )


def test_options_in_inline_code_are_not_broken():
    html = "<code>cut --by-two x-y</code> --not-code"
    assert of_site("hooks").unbroken(html) == '<code>cut <span class="option">--by-two</span> x-y</code> --not-code'


def test_lines_about_parameters_become_a_list(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    docstring = "Cut.\n\nx, y: two\n    lines.\nz: one.\nRaises: nothing"
    assert of_site("griffe_parameters").with_lists(docstring, {"x", "y", "z"}) == (
        "Cut.\n\n- `x`, `y`: two\n  lines.\n- `z`: one.\n\nRaises: nothing"
    )
