"""These tests run in a process of their own for each backend: tests/test_keras_backends.py sets the variable."""

import os

collect_ignore_glob = [] if os.environ.get("SECATEUR_KERAS_TESTS") else ["test_*.py"]
