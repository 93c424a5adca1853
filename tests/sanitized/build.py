"""Builds the Python module and the ONNX operators with AddressSanitizer and UBSan, and runs Python with them."""

import functools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START = Path(__file__).parent / "start"
CACHE = ROOT / ".cache" / "sanitized"
"""Compiled files stay here, so that the next build takes seconds."""
ASAN = {
    "abort_on_error": 0,
    "exitcode": 99,
    "detect_leaks": 0,  # Python and its packages leave much to the end of the process
    "allocator_may_return_null": 1,  # as without it: a size that no memory has room for is an error that is told
    "quarantine_size_mb": 64,
}
UBSAN = {"print_stacktrace": 1, "exitcode": 99}


@functools.cache
def preloaded() -> tuple[str, ...]:
    """The libraries that must come before Python's own; empty where the compiler has no AddressSanitizer.

    libstdc++ is among them, or AddressSanitizer finds no function of it to catch exceptions with.
    """
    if not shutil.which("c++"):
        return ()
    names = ["libasan.so", "libstdc++.so.6"]
    found = [subprocess.check_output(["c++", f"-print-file-name={name}"], text=True).strip() for name in names]
    return tuple(found) if all(os.path.isabs(path) for path in found) else ()


def build(folder: Path, limit: int) -> Path:
    """Make a wheel with the sanitizers and unpack it; returns the folder of the compiled files.

    limit: seconds.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT]
    settings = {
        "build-dir": CACHE,
        "cmake.build-type": "RelWithDebInfo",
        "cmake.define.SECATEUR_SANITIZE": "address,undefined",
        "install.strip": "false",
    }
    command += [word for name, value in settings.items() for word in ("--config-settings", f"{name}={value}")]
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "CXX": "c++"},
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    kernels = folder / "wheel" / "secateur" / "kernels"
    assert len(list(kernels.glob("*.so"))) == 2, "the wheel has not both compiled files"
    return kernels


@dataclass(frozen=True)
class Ran:
    """A process that ended: its code, what it printed, and what the sanitizers reported."""

    code: int
    output: str
    reports: str

    def well(self) -> str:
        """What it printed, after checking that it ended well and that nothing was reported."""
        assert not self.reports, self.reports[:6000]
        assert self.code == 0, f"exit {self.code}\n{self.output[-4000:]}"
        return self.output


def python(kernels: Path, isa: str, reports: Path, *arguments: str, limit: int) -> Ran:
    """Run Python with the sanitized files in `kernels`, on one instruction set; its reports go to a folder."""
    reports.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "ASAN_OPTIONS": _options(ASAN | {"log_path": reports / "report"}),
        "LD_PRELOAD": " ".join(preloaded()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(START), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SANITIZED_KERNELS": str(kernels),
        "SECATEUR_ISA": isa,
        "UBSAN_OPTIONS": _options(UBSAN),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )
    written = [file.read_text(errors="replace") for file in sorted(reports.iterdir())]
    written = [text for text in written if "ERROR: " in text]  # that there is no memory for a size is a warning
    if "runtime error: " in done.stdout:  # UBSan beside AddressSanitizer takes no log_path
        written.append(done.stdout)
    return Ran(done.returncode, done.stdout, "\n".join(written))


def _options(values: Mapping[str, object]) -> str:
    return ":".join(f"{name}={value}" for name, value in values.items())
