"""The one reader of safetensors headers: what it says, and what it refuses."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import ModelError
from secateur.torch.files.safetensors_header import read_entries


def write(path, header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def test_ranges_are_those_of_the_tensors(tmp_path):
    state = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_entries(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert {name: (e.dtype, e.shape, e.bytes) for name, e in found.items()} == {
        "a": ("BF16", (5,), 10),
        "b": ("F32", (2, 3), 24),
        "none": ("F32", (0, 4), 0),
    }
    assert raw[found["b"].begin : found["b"].end] == state["b"].numpy().tobytes()
    save_file({}, tmp_path / "empty.safetensors")
    assert read_entries(tmp_path / "empty.safetensors") == {}


def about(begin, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"{", b""),
        ([], b""),
        ({"w": 3}, b""),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"1234"),
        ({"w": about(0, 4)}, b"123"),
        ({"w": about(0, 4)}, b"12345"),
        ({"w": about(0, 4, shape=(2,))}, b"1234"),
        ({"w": about(4, 8)}, b"12345678"),
        ({"v": about(0, 4), "w": about(2, 6)}, b"123456"),
        ({"w": about(4, 0)}, b""),
        ({"w": about(0, 4, shape=(-1, -1))}, b"1234"),
        ({"w": about(0, 4, shape=(1.0,))}, b"1234"),
        ({"w": about(0, 4, shape=("1",))}, b"1234"),
        ({"w": about(0, 4, shape=(float("inf"),))}, b"1234"),
        ({"w": about(0, 4, shape=(2**64, 0))}, b"1234"),
        ({"w": about(0, 4, shape=[1] * 100)}, b"1234"),
        ({"w": {**about(0, 4), "shape": "1"}}, b"1234"),
        (b'{"a": ' + b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
    ],
)
def test_damage(tmp_path, header, body):
    with pytest.raises(ModelError, match=r"x\.safetensors is damaged or cut short \(.*\); save or copy it again"):
        read_entries(write(tmp_path / "x.safetensors", header, body))


def test_lengths_that_cannot_be(tmp_path):
    for content in (b"", b"1234", struct.pack("<Q", 2**63)):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="damaged or cut short"):
            read_entries(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_entries(tmp_path / "absent.safetensors")
