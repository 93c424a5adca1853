"""Saved models and calls that lie: no kernel may read or write outside, so that all of them are refused.

Every attack runs in a child process: one that is not refused may end it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file

from secateur import runtime
from secateur.kernels.native import load_native
from tests.runtime.blocks import added, compiled, holder

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")

CHILD = """
import json, sys, warnings
from pathlib import Path
import torch
from secateur import runtime
from secateur.errors import ModelError
from tests.runtime.blocks import added, holder
base, names = Path(sys.argv[1]), sys.argv[2:]
for name in names:
    print(name, end="\\t", flush=True)
    try:
        fast = runtime.load(base / name, holder())
        with torch.inference_mode():
            fast(**added())
    except ModelError as error:
        print("refused:", " ".join(str(error).split()), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    else:
        print("it ran", flush=True)
"""


def outcomes(base, names):
    """What became of each folder, from one child; those after a crash are missing."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(base), *names],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line), done


def first(steps, kind):
    return next(number for number, step in enumerate(steps) if step["kind"] == kind)


def steps_are(change):
    """An attack that changes the steps of the only chain, given the norms and layers that they name."""

    def attack(manifest, tensors):
        ((chain,),) = manifest["chains"].values()
        change(chain["steps"], chain)

    return attack


def linear(**fields):
    return steps_are(lambda steps, chain: steps[first(steps, 0)].update(fields))


def norm(**fields):
    return steps_are(lambda steps, chain: steps[first(steps, 1)].update(fields))


def attention(**fields):
    return steps_are(lambda steps, chain: steps[first(steps, 2)].update(fields))


def chain(**fields):
    return steps_are(lambda steps, chain: chain.update(fields))


def tensor(name, change):
    def attack(manifest, tensors):
        tensors[name] = change(tensors[name].clone()).contiguous()

    return attack


def header(name, at, number, type="<u4"):
    """The number at a place of a blob's header is another."""
    import numpy as np

    def change(blob):
        raw = np.frombuffer(np.array([number], type).tobytes(), np.uint8)
        blob[at : at + len(raw)] = torch.from_numpy(raw.copy())
        return blob

    return tensor(name, change)


def vector_that_is_a_blob(manifest, tensors):
    """A bias holds the header of a packed weight, whose indices lead outside, and a step names it."""
    blob = tensors["blocks.0.q.packed"][:160].clone()
    blob[32:40] = torch.tensor([160, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)
    tensors["blocks.0.up.bias"] = blob.view(torch.float32)
    ((chain,),) = manifest["chains"].values()
    chain["steps"][first(chain["steps"], 0)]["weight"] = "blocks.0.up.bias"


def one(change):
    def attack(manifest, tensors):
        manifest.update(change(manifest))

    return attack


BLOB = "blocks.0.q.packed"
ATTACKS = {
    "norm-as-weight": linear(weight="blocks.0.first.weight"),
    "bias-holds-a-blob": vector_that_is_a_blob,
    "bias-as-weight": linear(weight="blocks.0.q.bias"),
    "method-as-weight": linear(weight="blocks.0.q.forward"),
    "more-rows": header(BLOB, 16, 4096),
    "more-columns": header(BLOB, 20, 4096),
    "huge-rows": header(BLOB, 16, 2**31 - 1),
    "no-rows": header(BLOB, 16, 0),
    "other-size": header(BLOB, 32, 2**40, "<u8"),
    "most-nonzeros": header(BLOB, 24, 2**63, "<u8"),
    "wild-indices": tensor(BLOB, lambda t: torch.cat([t[:128], torch.full_like(t[128:], 255)])),
    "cut-blob": tensor(BLOB, lambda t: t[:-64]),
    "blob-of-floats": tensor(BLOB, lambda t: t.float()),
    "blob-in-two-dimensions": tensor(BLOB, lambda t: t.view(-1, 8)),
    "bias-too-short": tensor("blocks.0.q.bias", lambda t: t[:1]),
    "bias-of-halves": tensor("blocks.0.q.bias", lambda t: t.half()),
    "scale-too-short": tensor("blocks.0.first.weight", lambda t: t[:1]),
    "scale-of-halves": tensor("blocks.0.first.weight", lambda t: t.half()),
    "bias-of-others": linear(bias="blocks.0.up.bias"),
    "packed-as-bias": linear(bias="blocks.0.up.packed"),
    "packed-as-scale": norm(scale="blocks.0.up.packed"),
    "longer-scale": norm(scale="blocks.0.up.bias"),
    "reads-itself": linear(reads=[1]),
    "reads-later": linear(reads=[40]),
    "reads-negative": linear(reads=[-2]),
    "reads-nothing": linear(reads=[]),
    "reads-much": linear(reads=[0, -1, -1, 5]),
    "reads-huge": linear(reads=[2**62]),
    "reads-too-huge": linear(reads=[2**80]),
    "reads-true": linear(reads=[False]),
    "kind-unknown": linear(kind=9),
    "kind-huge": linear(kind=2**32),
    "rows-negative": linear(weight=None, rows=-4),
    "rows-huge": linear(weight=None, rows=2**62),
    "activation-unknown": linear(activation=77),
    "norm-unknown": norm(norm=-1),
    "epsilon-huge": norm(number=1e400),
    "epsilon-negative": norm(number=-1.0),
    "epsilon-text": norm(number="1"),
    "heads-uneven": attention(heads=[3, 2, 8]),
    "heads-huge": attention(heads=[2**31, 2**31, 2**31]),
    "heads-negative": attention(heads=[-3, -3, -8]),
    "heads-two": attention(heads=[3, 3]),
    "queries-outside": attention(first=[23, 0, 0]),
    "queries-negative": attention(first=[-8, 0, 0]),
    "factor-huge": attention(number=1e400),
    "no-steps": chain(steps=[]),
    "no-blocks": chain(blocks=[]),
    "block-twice": chain(blocks=["blocks.0", "blocks.0", "blocks.0"]),
    "holder-as-block": chain(blocks=[""]),
    "width-negative": chain(width=-24),
    "width-huge": chain(width=2**62),
    "outputs-more": chain(rows=2**31),
    "heads-other": chain(heads=-1),
    "unknown-key": chain(code="import os"),
    "unknown-part": one(lambda m: {"code": "import os"}),
    "newer": one(lambda m: {"version": 99}),
    "version-text": one(lambda m: {"version": "2"}),
    "packed-of-nothing": one(lambda m: {"packed": {**m["packed"], "blocks.9": "none"}}),
    "packed-left-out": one(lambda m: {"packed": {}}),
    "activation-of-nothing": one(lambda m: {"packed": {**m["packed"], "blocks.0.q": "swish"}}),
    "alias-of-packed": one(lambda m: {"aliases": {BLOB: "blocks.0.q.bias"}}),
    "identity-of-nothing": one(lambda m: {"identities": ["blocks.0.nothing"]}),
    "identity-in-nothing": one(lambda m: {"identities": ["blocks.9.nothing"]}),
    "tokens-negative": one(lambda m: {"by_tokens": {"blocks.0.q": [-1, 5]}}),
    "tokens-none": one(lambda m: {"by_tokens": {"blocks.0.q": []}}),
    "call-a-method": one(
        lambda m: {
            "one_calls": {
                "blocks.0": {
                    "kind": "gated",
                    "gate": "up",
                    "up": "up",
                    "down": "register_forward_hook",
                    "activation": "none",
                    "names": ["x"],
                    "x": "x",
                }
            }
        }
    ),
}


def test_every_attack_is_refused(tmp_path):
    _, fast, _ = compiled(holder(), added())
    runtime.save(fast, tmp_path / "fine")
    manifest = (tmp_path / "fine" / "runtime.json").read_text()
    tensors = load_file(tmp_path / "fine" / "runtime.safetensors")
    for name, attack in ATTACKS.items():
        changed, files = json.loads(manifest), dict(tensors)
        attack(changed, files)
        (tmp_path / name).mkdir()
        (tmp_path / name / "runtime.json").write_text(json.dumps(changed).replace("Infinity", "1e400"))
        save_file(files, tmp_path / name / "runtime.safetensors")
    found, done = outcomes(tmp_path, ["fine", *ATTACKS])
    assert found.pop("fine") == "it ran"
    wrong = {name: found.get(name, "the process ended") for name in ATTACKS}
    wrong = {name: said for name, said in wrong.items() if not said.startswith("refused: ")}
    assert wrong == {}, done.stderr[-2000:]
    assert done.returncode == 0


CALLS = """
import numpy as np, torch
from secateur.kernels import packing as P
from secateur.kernels.native import load_native
from secateur.runtime.layers import operators as ops
from secateur.runtime.layers.linear import SparseLinear
from tests.runtime.blocks import added, compiled, holder

def refused(what, call, *errors):
    try:
        call()
    except errors or (ValueError,) as error:
        print(what, "refused", flush=True)
    else:
        print(what, "ran", flush=True)

rng = np.random.default_rng(0)
weight = rng.standard_normal((40, 64), dtype=np.float32) * (rng.random((40, 64)) < 0.3)
good, x, bias = torch.from_numpy(P.pack(weight)), torch.randn(3, 64), torch.zeros(40)
bad = good.clone()
bad[200:] = 255
after = (None, None, 0, None, None, 0.0)
ops.sparse_linear(x, good, bias, 40, 0)
refused("short bias", lambda: ops.sparse_linear(x, good, bias[:3], 40, 0))
refused("bias of doubles", lambda: ops.sparse_linear(x, good, bias.double(), 40, 0))
refused("every second byte", lambda: ops.sparse_linear(x, good.repeat_interleave(2)[::2], bias, 40, 0))
refused("floats", lambda: ops.sparse_linear(x, good.view(torch.float32), bias, 40, 0))
refused("other columns", lambda: ops.sparse_linear(x[:, :60], good, bias, 40, 0))
refused("other rows", lambda: ops.sparse_linear(x, good, torch.zeros(41), 41, 0))
refused("damaged", lambda: ops.sparse_linear(x, bad, bias, 40, 0))
refused("damaged, with more", lambda: ops.sparse_linear_after(x, bad, bias, 40, 0, *after))

layer = SparseLinear(good.clone(), bias)
refused("layer", lambda: SparseLinear(bad))
refused("exchanged", lambda: setattr(layer, "packed", bad))
refused("exchanged for None", lambda: setattr(layer, "packed", None))
refused("exchanged for another size", lambda: setattr(layer, "packed", torch.from_numpy(P.pack(weight[:8]))))
refused("exchanged bias", lambda: setattr(layer, "bias", bias[:5]))
for assign in (False, True):
    state = {"packed": bad[: good.numel()], "bias": bias}
    refused("state", lambda: layer.load_state_dict(state, assign=assign), RuntimeError)
    state = {"packed": good, "bias": bias.double()}
    refused("state of doubles", lambda: layer.load_state_dict(state, assign=assign), RuntimeError)
assert torch.equal(layer(x), ops.sparse_linear(x, good, bias, 40, 0))

written = good.clone()
ops.sparse_linear(x, written, bias, 40, 0)
written[200:] = 255
refused("written to", lambda: ops.sparse_linear(x, written, bias, 40, 0))

_, fast, batch = compiled(holder(), added())
(chain,) = fast.chains
parts = [part.detach() for part in chain.tensors()]
call = lambda parts, steps: ops.sparse_chain(batch["x"], batch["seen"], parts, steps, chain.numbers, 3, 24)
call(parts, chain.steps)
blob = parts[0].clone()
blob[200:] = 255
refused("chain, damaged", lambda: call([blob, *parts[1:]], chain.steps))
refused("chain, floats", lambda: call([parts[0].view(torch.float32), *parts[1:]], chain.steps))
numbers = {0: 2**32, 1: -5, 4: -1, 7: 2**62, 8: 2**62, 9: 2**62, 12: 2**40, 14: 2**62, 16: -1}
for place, number in numbers.items():
    steps = chain.steps.clone()
    steps[:, place] = number
    refused(f"chain, field {place}", lambda: call(parts, steps))
table = (chain.steps.data_ptr(), chain.numbers.data_ptr())
for count in (2**20 + 1, 2**60, 2**63 - 1, -1):
    refused(f"table of {count}", lambda: load_native().Token(*table, count, 24, [], []))
"""


def test_every_call_with_a_bad_weight_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-3000:])
    assert [line for line in lines if not line.endswith(" refused")] == []
    assert len(lines) == 33
