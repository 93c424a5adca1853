"""No test asks the network: a hub id that a test names is looked for in the cache only. Processes that share the tests
get the longest files first, so that they end together."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SECATEUR_STRICT_RULES"] = "1"
LONGEST = ("test_native.py", "test_keras.py", "test_trace_random.py")  # one or two tests that take minutes


def pytest_collection_modifyitems(items):
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -tests[item.path]))
