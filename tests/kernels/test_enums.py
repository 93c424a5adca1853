"""The numbers in Python are those of the C headers, by name and position; the kernels' room needs numpy alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.kernels import format
from secateur.kernels.native import ISAS

HEADERS = Path(__file__).parents[2] / "native" / "include" / "secateur"


def enum(name):
    """The members of an enum in kernels.h: number -> name without its prefix, in small letters."""
    text = re.sub(r"/\*.*?\*/", "", (HEADERS / "kernels.h").read_text(), flags=re.S)
    body = re.search(rf"enum {name} {{(.*?)}}", text, re.S).group(1)
    return {int(number): member.lower() for member, number in re.findall(r"SCT_(\w+) = (\d+)", body)}


@pytest.mark.parametrize(
    ("name", "expected", "spelling"),
    [
        ("sct_activation", enumerate(format.ACTIVATIONS), {}),
        ("sct_norm", enumerate(format.NORMS), {"no_norm": "none"}),
        ("sct_format", enumerate(format.FORMATS, 1), {}),
        ("sct_value", enumerate(format.VALUES), {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i8": "int8"}),
        ("sct_step_kind", enumerate(f"{kind}_step" for kind in format.STEP_KINDS), {}),
        ("sct_isa", enumerate(f"isa_{isa}" for isa in ISAS), {}),
    ],
)
def test_names_have_the_numbers_of_the_header(name, expected, spelling):
    assert {number: spelling.get(member, member) for number, member in enum(name).items()} == dict(expected)


def test_constants_have_the_numbers_of_their_names():
    for names in (format.STEP_KINDS, format.NORMS[1:]):
        values = format.STEP_KINDS if names is format.STEP_KINDS else format.NORMS
        assert [getattr(format, name.upper()) for name in names] == [values.index(name) for name in names]


def test_a_row_of_a_step_table_has_the_fields_of_the_header():
    (fields,) = re.findall(r"kStepFields = (\d+);", (HEADERS / "steps.h").read_text())
    assert int(fields) == format.STEP_FIELDS


def test_the_kernels_room_imports_numpy_alone():
    code = (
        "import sys; from secateur.kernels import format, native, packing, reference, steps, zero_patterns; "
        "assert not {'torch', 'keras', 'onnx', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
