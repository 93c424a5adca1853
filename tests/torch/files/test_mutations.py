"""Saved folders with one thing changed: refused in one sentence, or the same model; never noise, never a traceback."""

import copy
import json
import shutil
import struct
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur.errors import PlanError, SecateurError
from secateur.plan import Plan
from secateur.torch.files import saving
from secateur.torch.open import load_model
from tests import zoo
from tests.torch.files.shrunk import shrunk

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 1.5, float("nan"), float("inf"), "x", "", [], {}, [0, 0], ["\0"]]
CASES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


class Saved(NamedTuple):
    """A folder, how it is opened and gives numbers, these numbers, and the file and the key of its manifest."""

    folder: object
    load: object
    output: torch.Tensor
    file: str
    key: str | None


def plain():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30)]
    return zoo.noisy(nn.Sequential(*layers, nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 2))))


def plain_output(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 24).reshape(3, 8))


@pytest.fixture(scope="module", params=["bert", "plain"])
def saved(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("mutations") / request.param
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if request.param == "plain":
        host = secateur.open(zoo.pruned(plain(), 0.1), example=(torch.rand(3, 8),))
        (axis,) = [axis.name for axis in host.layout.axes.values() if axis.size == 40]
        host.resize(Plan({axis: np.arange(0, 40, 2)}))
        assert saving.save(host.model, place, pack=True).packed
        load, output = lambda folder: plain_output(saving.load(folder, plain())), plain_output(host.model)
        found = Saved(place, load, output, saving.MANIFEST, None)
    else:
        model = shrunk("bert", {"L0.ffn": range(9), "L1.head": [1], "layers": [1, 0]}, **SIZES)
        zoo.pruned(model, only=lambda module: True)
        assert saving.save(model, place, pack=True).packed
        load, output = lambda folder: zoo.logits(load_model(folder)), zoo.logits(model)
        found = Saved(place, load, output, "config.json", "quantization_config")
    assert torch.equal(found.load(place), found.output)
    return found


def paths(value, path=()):
    """The place of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, (*path, key))


@st.composite
def mutated(draw, value):
    """A JSON object with one value replaced, increased, doubled, renamed or removed."""
    result = copy.deepcopy(value)
    *path, last = draw(st.sampled_from([path for path in paths(value) if path]))
    inside = result
    for key in path:
        inside = inside[key]
    old = inside[last]
    how = draw(st.sampled_from(["replace", "remove", "more", "less", "double"]))
    if how == "remove":
        del inside[last]
    elif how in ("more", "less") and type(old) in (int, float):
        inside[last] = old + (1 if how == "more" else -1)
    elif how == "double" and isinstance(old, list):
        inside[last] = old + old
    elif how == "double" and isinstance(inside, dict):
        inside[last + "x"] = old
    else:
        inside[last] = draw(st.sampled_from(VALUES))
    return result


def same_or_refused(saved, folder):
    """Load a changed folder twice: SecateurError in one line, or twice the same numbers, which are returned."""
    refusal = ""
    try:
        first = saved.load(folder)
    except SecateurError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if refusal:
        return None
    np.testing.assert_array_equal(saved.load(folder), first)  # NaN, of a changed weight, equals NaN
    return first


@given(data=st.data())
@CASES
def test_the_manifest(data, saved, tmp_path_factory):
    whole = json.loads((saved.folder / saved.file).read_text())
    if saved.key is None:
        whole = data.draw(mutated(whole))
    else:
        whole[saved.key] = data.draw(mutated(whole[saved.key]))
    place = tmp_path_factory.mktemp("a") / "model"
    shutil.copytree(saved.folder, place)
    (place / saved.file).write_text(json.dumps(whole))
    output = same_or_refused(saved, place)
    assert output is None or torch.equal(output, saved.output)


@given(data=st.data())
@CASES
def test_bytes_of_the_weights(data, saved, tmp_path_factory):
    place = tmp_path_factory.mktemp("a") / "model"
    shutil.copytree(saved.folder, place)
    file = place / "model.safetensors"
    whole = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    in_header = data.draw(st.booleans())
    at = data.draw(st.integers(0, header - 1) if in_header else st.integers(header, len(whole) - 1))
    how = data.draw(st.sampled_from(["flip", "replace", "remove", "insert", "cut"]))
    if how == "flip":
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "replace":
        whole[at] = data.draw(st.sampled_from(b'0123456789FIUB[]{}, "\0\xff'))
    elif how == "remove":
        del whole[at]
    elif how == "insert":
        whole[at:at] = b"0"
    else:
        del whole[at:]
    file.write_bytes(whole)
    output = same_or_refused(saved, place)
    assert output is None or not in_header or torch.equal(output, saved.output)


@pytest.mark.parametrize("dtype", ["I32", "U32"])
def test_integers_are_no_weights(dtype, saved, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(saved.folder, place)
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', f'"dtype":"{dtype}"'.encode(), 1))
    with pytest.raises(SecateurError, match="as integers|as torch.u?int32"):
        saved.load(place)


@given(data=st.data())
@CASES
def test_the_plan(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("a")
    mask = np.arange(12).reshape(4, 3) % 3 > 0
    plan = Plan({"ffn": np.array([1, 3])}, {"up": mask}, {"ffn": 4}, {"a": [1]}, {"up": np.ones((4, 3), np.float32)})
    plan.save(place)
    changed = data.draw(mutated(json.loads((place / "plan.json").read_text())))
    (place / "plan.json").write_text(json.dumps(changed))
    refusal = ""
    try:
        read = Plan.load(place)
    except PlanError as error:
        refusal = str(error)
    assert "\n" not in refusal
    if refusal:
        return
    for units, size in ((read.keep[name], read.sizes[name]) for name in read.keep):
        assert len(set(units.tolist())) == len(units)
        assert all(0 <= unit < size for unit in units)
    assert all(array.size <= 16 for array in (*read.masks.values(), *read.weights.values()))
