"""Saved models with random damage, in a process of its own: `python -m tests.runtime.mutations HOW_MANY SEED`.

Every damaged folder is refused with a ModelError, or loads and computes. It may compute something else only where the
damage is in a weight, or in an entry of the manifest that says what is computed. Prints what became of all.
"""

import json
import math
import os
import random
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from secateur import runtime
from secateur.errors import ModelError
from tests import zoo
from tests.runtime.blocks import Holder, added

MEANING = {
    "activation",
    "aliases",
    "attention",
    "bias",
    "blocks",
    "by_tokens",
    "constants",
    "down",
    "epsilon",
    "first",
    "form",
    "gate",
    "given",
    "heads",
    "identities",
    "kind",
    "linear",
    "mask",
    "names",
    "norm",
    "number",
    "packed",
    "reads",
    "residual",
    "scale",
    "shift",
    "shown",
    "steps",
    "tensors",
    "turns",
    "up",
    "weight",
    "without_mask",
    "x",
}
"""Entries of the manifest that say what is computed, and with which weights."""

OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([-(2**63), 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 10**30, 2**16]),
    st.sampled_from([0.5, -1.0, 1e308, math.inf, -math.inf, math.nan, 1e-320]),
    st.sampled_from(
        ["", ".", "..", "packed", "blocks.0", "blocks.0.q.packed", "__class__", "forward", "\u0000", "x" * 3000]
    ),
    st.sampled_from([[], {}, [0], [[]], {"a": 1}, ["blocks.0.first.weight"]]),
)


def places(value, path=()):
    """The path of every value in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(document, path):
    for key in path:
        document = document[key]
    return document


class Saved:
    """A compiled model on disk, its skeleton, and what it computes."""

    def __init__(self, folder, make, compute, example):
        self.folder, self.make, self.compute = Path(folder), make, compute
        runtime.save(runtime.compile(make(), measure=False, example=example, tokens=32), self.folder)
        self.files = {name: (self.folder / name).read_bytes() for name in ("runtime.json", "runtime.safetensors")}
        self.manifest = json.loads(self.files["runtime.json"])
        self.places = [path for path in places(self.manifest) if path]
        self.skeleton = make()
        self.expected = self.run()

    def run(self):
        with torch.inference_mode():
            return self.compute(runtime.load(self.folder, self.skeleton))

    def outcome(self, name, content, what, *, may_differ):
        """Load and run with other content of a file; afterwards the file is as before."""
        (self.folder / name).write_bytes(content)
        try:
            got = self.run()
        except ModelError:
            return "refused"
        finally:
            fresh = self.folder / f"{name}.fresh"  # a new file: the old one may still be mapped
            fresh.write_bytes(self.files[name])
            os.replace(fresh, self.folder / name)
        same = got.shape == self.expected.shape and torch.allclose(got, self.expected, rtol=1e-4, atol=1e-5)
        assert same or may_differ, f"{what}: computes something else"
        return "same" if same else "differs"

    def other_manifest(self, data):
        document = json.loads(self.files["runtime.json"])
        path = data.draw(st.sampled_from(self.places), label="place")
        way = data.draw(st.sampled_from(["replace", "drop", "add", "swap"]), label="way")
        parent, key = at(document, path[:-1]), path[-1]
        if way == "replace":
            parent[key] = data.draw(OTHERS, label="value")
        elif way == "drop":
            del parent[key]
        elif way == "add" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif way == "add":
            parent[data.draw(st.sampled_from(["code", "", "blocks.0", "version "]), label="key")] = parent[key]
        else:
            other = data.draw(st.sampled_from(self.places), label="other")
            parent[key] = at(json.loads(self.files["runtime.json"]), other)
        text = json.dumps(document).replace("Infinity", "1e999")
        may_differ = bool(MEANING & set(map(str, path)))
        return self.outcome("runtime.json", text.encode(), (path, way), may_differ=may_differ)

    def other_byte(self, data, *, name):
        raw = bytearray(self.files[name])
        head = 8 + struct.unpack("<Q", raw[:8])[0] if name == "runtime.safetensors" else len(raw)
        region = data.draw(st.sampled_from(["head", "all"]), label="region")
        place = data.draw(st.integers(0, (head if region == "head" else len(raw)) - 1), label="byte")
        raw[place] ^= data.draw(st.integers(1, 255), label="bits")
        may_differ = name == "runtime.json" or place >= head
        return self.outcome(name, bytes(raw), (name, place), may_differ=may_differ)


def text_model():
    from tests.runtime import test_decoder as t

    return t.decoder("Llama", num_hidden_layers=1)


def text_output(model):
    from tests.runtime import test_decoder as t

    ids = t.prompt()
    known = model(input_ids=ids[:, :-1], use_cache=True)
    last = model(input_ids=ids[:, -1:], past_key_values=known.past_key_values, use_cache=True)
    return torch.cat([known.logits, last.logits], dim=1)


def main(how_many, seed):
    from tests.runtime import test_decoder as t

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = Counter()
    with tempfile.TemporaryDirectory() as place:
        models = [
            Saved(f"{place}/blocks", lambda: zoo.plain(lambda: Holder(2)), lambda m: m(**added())["last"], added()),
            Saved(f"{place}/text", text_model, text_output, t.example()),
        ]
        ways = {
            "manifest": Saved.other_manifest,
            "byte": lambda saved, data: saved.other_byte(data, name="runtime.safetensors"),
            "character": lambda saved, data: saved.other_byte(data, name="runtime.json"),
        }

        @seeded(seed)
        @settings(
            max_examples=how_many,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(st.data())
        def damaged(data):
            saved = models[data.draw(st.sampled_from([0, 0, 1]), label="model")]
            way = data.draw(st.sampled_from(["manifest", "manifest", "byte", "byte", "character"]), label="way")
            counts[way, ways[way](saved, data)] += 1

        damaged()
    print(json.dumps({f"{way} {outcome}": n for (way, outcome), n in sorted(counts.items())}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6))
