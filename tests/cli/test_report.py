"""`secateur report`: one page from the records of folders, and what it says where there are none."""

import pytest

from secateur.record import write_record
from secateur.report import bundle, page
from tests.report.records import several

pytest.importorskip("jinja2")
pytest.importorskip("vl_convert")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "javascript", lambda: "/* vega */")
    found = []
    for record in several():
        found.append(tmp_path / record.title)
        found[-1].mkdir()
        write_record(record, found[-1])
    return found


def test_one_line_names_the_page_and_its_size(call, folders, place):
    done = call("report", *folders, "--output", place / "page.html")
    assert (done.code, done.err) == (0, "")
    size = (place / "page.html").stat().st_size / 1e6
    assert done.out == f"{place / 'page.html'} written, {size:.1f} MB; open it in a browser\n"
    assert "Comparison of 3 models" in (place / "page.html").read_text(encoding="utf-8")


def test_the_page_is_called_report_and_is_not_replaced_unasked(call, refused, folders, place, monkeypatch):
    monkeypatch.chdir(place)
    assert call("report", folders[0]).code == 0
    before = (place / "report.html").read_bytes()
    assert refused("report", folders[1]) == "report.html exists; choose another output or pass --overwrite"
    assert call("report", folders[1], "--overwrite").code == 0
    assert (place / "report.html").read_bytes() != before


def test_a_folder_without_a_record(refused, folders, tmp_path, place):
    (tmp_path / "empty").mkdir()
    sentence = refused("report", folders[0], tmp_path / "empty", "--output", place / "page.html")
    assert sentence.startswith(f"{tmp_path / 'empty'} has no secateur-record.json; ")
    assert "`secateur prune MODEL --data DATA" in sentence


def test_a_missing_package_is_said_before_records_are_read(refused, tmp_path, place, monkeypatch):
    monkeypatch.setattr(bundle, "PACKAGES", ("not_there",))
    sentence = refused("report", tmp_path, "--output", place / "page.html")
    assert sentence == "a report needs the package not_there; install it with: pip install 'secateur[report]'"
