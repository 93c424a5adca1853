"""What tests of load share: small models that are called over and over, and what a process holds.

A workload is a list of (call, expected): a call without arguments, and the array that it gave when it was alone.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

THREADS = 8
WARM = 50
"""Calls of each thread before memory is measured: its scratch memory, and that of the allocator, is there then."""
GROWTH = 48 * 2**20
"""Bytes by which resident memory may grow: 500 bytes a call would be as much in 100,000 calls."""


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def held():
    """How many threads and open files this process has."""
    return {name: len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("task", "fd")}


def encoder_chain():
    """Forward passes of an encoder whose blocks run as one chain, at four shapes."""
    import torch

    from tests.runtime.blocks import added, compiled, holder

    _, fast, _ = compiled(holder(), added())
    assert len(fast.chains) == 1
    calls = []
    for batch, length in ((1, 5), (2, 7), (3, 9), (1, 33)):
        example = added(batch, length)

        def call(example=example):
            with torch.inference_mode():
                return fast(**example)["last"].numpy()

        calls.append((call, call().copy()))
    return calls


def decoder_step():
    """Steps of one token through a block of a decoder, at three batch sizes."""
    import torch
    from transformers import DynamicCache

    from secateur import runtime
    from secateur.runtime.run.decoder_step import decoders_of
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
    return calls


def program(operator):
    """A serialised ONNX program that is one operator of secateur."""
    from secateur.kernels import packing
    from tests.deploy.onnx_graph import test_chains
    from tests.kernels.weights import sparse
    from tests.runtime import test_onnx_library

    if operator == "SparseLinear":
        packed = packing.pack(sparse(60, 32, 0.3), tile=32)
        return test_onnx_library.program(packed, np.linspace(-1, 1, 60, dtype=np.float32))
    constants = [*test_chains.WEIGHTS, test_chains.BIAS, test_chains.SCALE]
    _, model, nodes = test_chains.both(test_chains.program(test_chains.layer(), constants, more=[test_chains.KEEP]))
    assert nodes == [operator]
    return model


def feed_of(session, batch, tokens):
    """Made-up inputs of a program of `program`."""
    x = np.random.default_rng(tokens).standard_normal((batch, tokens, 32)).astype(np.float32)
    feeds = {"x": x, "keep": np.ones((batch, 1, 1, tokens), bool)}
    return {value.name: feeds[value.name] for value in session.get_inputs()}


def onnx_operator(operator, threads=2):
    """Runs of one session of ONNX Runtime, at four lengths."""
    from tests.deploy.onnx_graph.programs import session

    one = session(program(operator), threads=threads)
    calls = []
    for tokens in (1, 7, 40, 100):

        def call(feed=feed_of(one, 2, tokens)):
            return one.run(None, feed)[0]

        calls.append((call, call()))
    return calls


def sparse_linear():
    """Runs of one linear layer."""
    return onnx_operator("SparseLinear")


def sparse_chain():
    """Runs of a whole layer of an encoder as one operator."""
    return onnx_operator("SparseChain")


WORKLOADS = (encoder_chain, decoder_step, sparse_linear, sparse_chain)


def hammer(calls, count):
    """Make `count` calls from `THREADS` threads, each with its own input over and over; the bytes that memory grew."""
    barrier, right, grown = threading.Barrier(THREADS), [], []

    def work(number):
        call, expected = calls[number % len(calls)]
        done = 0
        for turn in range(count // THREADS):
            if turn == WARM and barrier.wait(timeout=300) == 0:
                grown.append(resident())
            done += np.array_equal(call(), expected)
        right.append(done)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [count // THREADS] * THREADS
    return resident() - grown[0]


class Day:
    """Models that are loaded and dropped and sessions that are opened and closed, each for a few calls of any shape.

    The first answer to each input is kept, and later ones are the same but for rounding: how many threads there are
    decides what runs as a chain, and in which order torch adds.
    """

    def __init__(self, folder):
        from secateur import runtime
        from tests.runtime.blocks import compiled, encoder
        from tests.runtime.test_decoder import decoder, example

        self.folders = {"encoder": folder / "encoder", "decoder": folder / "decoder"}
        runtime.save(compiled(encoder("bert"))[1], self.folders["encoder"])
        runtime.save(runtime.compile(decoder("Llama"), measure=False, example=example()), self.folders["decoder"])
        self.programs = [program("SparseLinear"), program("SparseChain")]
        self.random = np.random.default_rng(0)
        self.first, self.calls = {}, 0

    def round(self, calls=6):
        """Load or open everything once, and call it from as many threads as chance has it."""
        from secateur import runtime
        from tests.deploy.onnx_graph.programs import session

        for name, folder in self.folders.items():
            self._call(name, calls, self._model(runtime.load(folder)))
        for number, one in enumerate(self.programs):
            opened = session(one, int(self.random.integers(1, 4)))
            self._call(number, calls, lambda batch, length, s=opened: s.run(None, feed_of(s, batch, length))[0])

    def _model(self, model):
        import torch

        from tests.runtime.blocks import text

        def answer(batch, length):
            with torch.inference_mode():
                return model(**text(batch, length)).logits.numpy()

        return answer

    def _call(self, name, calls, answer):
        import torch

        shapes = [(int(self.random.integers(1, 5)), int(self.random.integers(1, 40))) for _ in range(calls)]
        torch.set_num_threads(int(self.random.integers(1, 4)))
        with ThreadPoolExecutor(int(self.random.integers(1, 5))) as pool:
            for shape, found in zip(shapes, pool.map(lambda shape: answer(*shape), shapes), strict=True):
                first = self.first.setdefault((name, *shape), found)
                np.testing.assert_allclose(found, first, rtol=1e-4, atol=1e-5, err_msg=f"{name} {shape}")
        self.calls += calls
