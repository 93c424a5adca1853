"""The core needs no framework, and never imports one."""

import subprocess
import sys

CORE = (
    "arrays budget check cost criteria data dims errors evaluate files host "
    "layout opening plan pruning repair schedule select stats"
)


def test_the_core_lives_without_frameworks():
    code = f"""
import importlib, sys
frameworks = ("torch", "transformers", "tensorflow", "keras")
for name in frameworks:
    sys.modules[name] = None
import secateur
for name in {CORE.split()!r}:
    importlib.import_module("secateur." + name)
layout = secateur.Layout.from_text("axes\\n  ffn 4 ffn\\nparameters\\n  w : ffn 2 < x 1")
assert layout.shape("w") == (4, 2)
assert not [name for name in sys.modules if name.startswith("secateur.torch")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
