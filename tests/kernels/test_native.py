"""The kernels' own unit tests: with the library that pip built; and, for minutes, under AddressSanitizer and UBSan, and
for AArch64 under qemu.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "native" / "tests"
LIMIT = 1700  # seconds; compiling takes some minutes of both cores, and other tests run beside it
COMPILER = shutil.which("c++")


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
def test_with_the_library_that_pip_built(tmp_path):
    built = sorted(ROOT.glob("build/*/native/libsecateur_kernels.a"), key=lambda file: file.stat().st_mtime)
    if not built:
        pytest.skip("pip has left no static library in build")
    sources = ["-I", ROOT / "native" / "include", TESTS / "test_kernels.cpp", built[-1], "-pthread"]
    run(COMPILER, "-std=c++17", "-O1", *sources, "-o", tmp_path / "test_kernels")
    assert "all checks passed" in run(tmp_path / "test_kernels")


@pytest.mark.long
@pytest.mark.timeout(LIMIT + 50)
@pytest.mark.skipif(not (shutil.which("cmake") and COMPILER), reason="needs cmake and a C++ compiler")
def test_under_sanitizers(tmp_path):
    assert "all checks passed" in run(TESTS / "run_sanitized.sh", tmp_path)


@pytest.mark.long
@pytest.mark.timeout(LIMIT + 50)
@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and shutil.which("aarch64-linux-gnu-g++")),
    reason="needs qemu-user and a cross compiler for AArch64",
)
def test_neon_under_qemu(tmp_path):
    assert "all checks passed" in run(TESTS / "run_neon.sh", tmp_path)
