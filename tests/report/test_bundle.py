"""The script of Vega is made once, kept by its versions, and never taken damaged."""

import pytest

from secateur.files.cache import cache_folder
from secateur.report.bundle import javascript

vl_convert = pytest.importorskip("vl_convert")


@pytest.fixture
def made(monkeypatch):
    """How often the script was made; it holds what would end a script element."""
    calls = []

    def bundle(snippet):
        calls.append(1)
        return 'let a = "</script><!--";'

    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    return calls


def test_it_is_made_once(made):
    first = javascript()
    assert javascript() == first == 'let a = "<\\/script><\\!--";'
    assert len(made) == 1


def test_other_versions_have_another_file(made, monkeypatch):
    javascript()
    monkeypatch.setattr(vl_convert, "get_vega_version", lambda: "999")
    javascript()
    assert len(made) == 2
    assert len(list(cache_folder().glob("vega-*.js"))) == 2


def test_a_damaged_file_is_made_again(made):
    first = javascript()
    (file,) = cache_folder().iterdir()
    for damaged in (file.read_bytes()[:-3], b"", b"\xff\xfe", b"let a = 1;\nlet b;"):
        file.write_bytes(damaged)
        assert javascript() == first
    assert len(made) == 5


def test_a_cache_that_cannot_be_written_is_no_error(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "file" / "below"))
    assert javascript() == javascript()
    assert len(made) == 2
