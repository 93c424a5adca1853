"""No test asks the network, nor reads what was measured before. The longest files come first, so that processes that
share the tests end together."""

import os
from collections import Counter

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a hub id that a test names is looked for in the cache only
os.environ["SECATEUR_STRICT_RULES"] = "1"  # an error in a rule raises instead of freezing axes
LONGEST = (  # few, but long
    "test_sanitized.py",
    "test_native.py",
    "test_keras_backends.py",
    "test_random_models.py",
    "test_recipes.py",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No measurement of another test or of the user is read."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -tests[item.path]))
