"""The kernels' own unit tests: under AddressSanitizer and UBSan, and for AArch64 under qemu."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "native" / "tests"
LIMIT = 1700  # seconds; compiling takes some minutes of both cores, and other tests run beside it


def run(script, folder):
    done = subprocess.run([SCRIPTS / script, folder], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all checks passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 50)
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler")
def test_under_sanitizers(tmp_path):
    run("run_sanitized.sh", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 50)
@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")),
    reason="needs qemu-user and a cross compiler for AArch64",
)
def test_neon_under_qemu(tmp_path):
    run("run_neon.sh", tmp_path)
