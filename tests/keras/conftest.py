"""These tests run in a process of their own for each backend: see tests/test_keras.py, which sets the variable."""

import os

collect_ignore_glob = [] if os.environ.get("SECATEUR_KERAS_TESTS") else ["test_*.py"]
