"""Many calls from many threads: every result is the first one, and memory does not grow."""

import threading
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from secateur import runtime
from secateur.kernels import packing
from secateur.kernels.native import load_native
from secateur.runtime.run.decoder_step import decoders_of
from tests.kernels.weights import sparse
from tests.runtime.blocks import added, compiled, holder

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"),
]

THREADS, CALLS = 8, 10_000
WARM = 50
"""Calls of each thread before memory is measured: its scratch memory, and that of the allocator, is there then."""
GROWTH = 48 * 2**20
"""Bytes by which resident memory may grow: 4 KiB a call would be 40 MiB."""


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def hammer(calls):
    """Call functions from threads, each with its own input over and over; `calls` is a list of (call, expected)."""
    barrier, right, grown = threading.Barrier(THREADS), [], []

    def work(number):
        call, expected = calls[number % len(calls)]
        done = 0
        for turn in range(CALLS // THREADS):
            if turn == WARM and barrier.wait(timeout=300) == 0:
                grown.append(resident())
            done += np.array_equal(call(), expected)
        right.append(done)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [CALLS // THREADS] * THREADS
    assert resident() - grown[0] < GROWTH


def test_a_chain_of_an_encoder():
    _, fast, _ = compiled(holder(), added())
    assert len(fast.chains) == 1
    calls = []
    for batch, length in ((1, 5), (2, 7), (3, 9), (1, 33)):
        example = added(batch, length)

        def call(example=example):
            with torch.inference_mode():
                return fast(**example)["last"].numpy()

        calls.append((call, call().copy()))
    hammer(calls)


def test_a_step_of_a_decoder():
    from transformers import DynamicCache

    from tests.runtime.test_decoder import decoder, example

    fast = runtime.compile(decoder("Llama", num_hidden_layers=1), measure=False, example=example())
    block = fast.model.layers[0]
    assert list(decoders_of(fast)) == ["model.layers.0"]
    calls = []
    for batch in (1, 2, 3, 1):
        x = torch.randn(batch, 1, 48, generator=torch.Generator().manual_seed(batch))
        with torch.inference_mode():
            angles = fast.model.rotary_emb(x, torch.zeros(batch, 1, dtype=torch.long))
            arguments = {"position_embeddings": tuple(t.contiguous() for t in angles), "use_cache": True}

        def call(x=x, arguments=arguments):
            with torch.inference_mode():
                output = block(x, past_key_values=DynamicCache(), **arguments)
            return (output[0] if isinstance(output, tuple) else output).numpy()

        calls.append((call, call().copy()))
    hammer(calls)


@pytest.mark.parametrize("operator", ["SparseLinear", "SparseChain"])
def test_the_operators_of_onnx_runtime(operator):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tests.deploy.onnx_graph import test_chains
    from tests.deploy.onnx_graph.programs import session
    from tests.runtime.test_onnx_library import program

    if operator == "SparseLinear":
        model = program(packing.pack(sparse(60, 32, 0.3), tile=32), np.linspace(-1, 1, 60, dtype=np.float32))
    else:
        constants = [*test_chains.WEIGHTS, test_chains.BIAS, test_chains.SCALE]
        _, model, nodes = test_chains.both(test_chains.program(test_chains.layer(), constants, more=[test_chains.KEEP]))
        assert nodes == [operator]
    one = session(model, threads=2)
    names = [value.name for value in one.get_inputs()]
    calls = []
    for tokens in (1, 7, 40, 100):
        x = np.random.default_rng(tokens).standard_normal((2, tokens, 32)).astype(np.float32)
        all_feeds = {"x": x, "keep": np.ones((2, 1, 1, tokens), bool)}
        feed = {name: all_feeds[name] for name in names}

        def call(feed=feed):
            return one.run(None, feed)[0]

        calls.append((call, call()))
    hammer(calls)
