"""Pages without Vega, which takes seconds to make: the tests of the browser take the real one."""

import pytest

from secateur.report import page


@pytest.fixture
def no_vega(monkeypatch):
    monkeypatch.setattr(page, "javascript", lambda: "/* vega */")
