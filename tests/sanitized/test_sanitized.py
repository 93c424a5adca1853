"""The Python module, saved models and the ONNX operators under AddressSanitizer and UBSan, on each instruction set."""

import json

import pytest

from secateur.kernels.native import available_isas
from tests.sanitized import build

LIMIT = 1700  # seconds; the first build takes some minutes of both cores
FRESH = 2000
"""How many freshly damaged files of each format the kernels read."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(LIMIT + 50),
    pytest.mark.skipif(not build.preloaded(), reason="needs a C++ compiler with AddressSanitizer (libasan)"),
]
every_isa = pytest.mark.parametrize("isa", available_isas())


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The folder of the sanitized files."""
    return build.build(tmp_path_factory.mktemp("sanitized"), LIMIT)


@pytest.fixture
def python(kernels, tmp_path):
    """Runs Python with the sanitized files on an instruction set."""

    def run(isa, *arguments):
        return build.python(kernels, isa, tmp_path / "reports", *arguments, limit=LIMIT)

    return run


# -- the net itself ---------------------------------------------------------------------------------------------------

LINEAR = """
import numpy as np
from secateur.kernels import packing
from secateur.kernels.native import load_native
blob = packing.pack(np.eye(8, 40, dtype=np.float32), format="tiled")
memory, y = np.ones(40 * 4 + {bytes}, np.uint8), np.ones((1, 8), np.float32)
load_native().linear(blob.ctypes.data, len(blob), memory.ctypes.data + {begin}, 1, 40, 40, 0, 0, y.ctypes.data, 8, 1, 0)
print("it ran")
"""
SESSION = """
import numpy as np
from secateur.kernels import packing
from tests.runtime.test_onnx_library import program, session
ready = session(program(packing.pack(np.eye(8, 40, dtype=np.float32), format="tiled")))
x, binding = np.ones({floats}, np.float32), ready.io_binding()
binding.bind_input("x", "cpu", 0, np.float32, (1, 40), x.ctypes.data)
binding.bind_output("y")
ready.run_with_iobinding(binding)
print("it ran")
"""


@every_isa
@pytest.mark.parametrize(
    ("code", "report"),
    [
        (LINEAR.format(bytes=0, begin=0), None),
        (LINEAR.format(bytes=-4, begin=0), "heap-buffer-overflow"),
        (LINEAR.format(bytes=4, begin=1), "misaligned address"),
        (SESSION.format(floats=40), None),
        (SESSION.format(floats=39), "heap-buffer-overflow"),
    ],
    ids=["whole", "too short", "between addresses", "whole in a session", "too short in a session"],
)
def test_what_is_wrong_is_reported(code, report, isa, python):
    ran = python(isa, "-c", code)
    if report is None:
        assert ran.well() == "it ran\n"
    else:
        assert report in ran.reports
        assert ran.code != 0
        assert "it ran" not in ran.output


# -- what must not be reported ----------------------------------------------------------------------------------------


@pytest.fixture
def check_tests(python):
    """Runs files of tests, and checks that all passed, none was skipped, and nothing was reported."""

    def run(isa, *files):
        chosen = ["-m", "not long", "-k", "not torch_compile", *(f"tests/{file}" for file in files)]
        ran = python(isa, "-m", "pytest", "--capture=no", "-p", "no:cacheprovider", *chosen)
        said = ran.well().strip().splitlines()[-1]
        assert "passed" in said
        assert "skipped" not in said

    return run


@pytest.fixture
def check_files(python, tmp_path):
    """Reads damaged files in a process, and checks that they were so many and nothing was reported."""

    def run(isa, least, *options):
        python(isa, "-m", "tests.fuzz", *options, "--limit", "60", "--json", str(tmp_path / "said.json")).well()
        said = json.loads((tmp_path / "said.json").read_text())
        assert sum(result["cases"] if isinstance(result, dict) else 1 for result in said.values()) >= least

    return run


def test_kernels(check_tests):
    """They name each instruction set themselves."""
    check_tests("auto", "kernels/test_kernels.py", "kernels/test_formats.py", "kernels/test_validation.py")


def test_damaged_weights(check_files):
    """Each is multiplied on every instruction set."""
    check_files("auto", FRESH, "--format", "blobs", "--cases", str(FRESH))
    check_files("auto", 8, "--format", "blobs", "--corpus")


@every_isa
def test_damaged_chains(isa, check_files):
    check_files(isa, FRESH, "--format", "chains", "--cases", str(FRESH))


@every_isa
def test_damaged_models(isa, check_files):
    check_files(isa, 20, "--format", "compiled", "--format", "onnx", "--corpus")


@every_isa
@pytest.mark.parametrize(
    "file",
    [
        "repair/test_repair.py",
        "runtime/test_attacks.py",
        "runtime/test_attention.py",
        "runtime/test_chain.py",
        "runtime/test_decoder.py",
        "runtime/test_mutations.py",
        "runtime/test_onnx_library.py",
        "runtime/test_saving.py",
    ],
)
def test_other_tests(file, isa, check_tests):
    check_tests(isa, file)
