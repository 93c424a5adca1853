"""One layer called from many threads at once, and after a fork."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from secateur.kernels import packing as P
from secateur.kernels.native import load_native

pytestmark = pytest.mark.skipif(load_native() is None, reason="the kernels are not compiled")


def layer(**packing):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((300, 400), dtype=np.float32) * (rng.random((300, 50, 8)).argsort(-1) < 2).reshape(
        300, 400
    )
    return P.pack(weight, **packing), rng.standard_normal((70, 400), dtype=np.float32)


@pytest.mark.parametrize("packing", [{}, {"format": "quad", "value": "int8"}, {"format": "nm", "keep": 4, "of": 8}])
def test_eight_threads_call_one_layer(packing):
    blob, x = layer(**packing)
    expected = P.linear(blob, x)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda i: P.linear(blob, x, threads=1 + i % 3), range(200))
        assert all(np.array_equal(y, expected) for y in results)


def _child(queue):
    blob, x = layer()
    queue.put(float(P.linear(blob, x, threads=2).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use():
    blob, x = layer()
    expected = float(P.linear(blob, x, threads=2).sum())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert float(P.linear(blob, x, threads=2).sum()) == expected


SHARED = """
import os, torch
from secateur.kernels import packing as P, native
from secateur.runtime.layers import operators as ops
import numpy as np
weight = np.eye(256, dtype=np.float32)
x = torch.randn(600, 256)
blob = torch.from_numpy(P.pack(weight))
torch.set_num_threads(2)
y = ops.sparse_linear(x, blob, None, 256, 0)
assert torch.equal(x, y)
pid = os.fork()
if pid == 0:
    # numpy compares: torch's own parallel operators hang after a fork
    ok = np.array_equal(ops.sparse_linear(x, blob, None, 256, 0).numpy(), x.numpy())
    os._exit(0 if ok else 1)
assert os.waitpid(pid, 0)[1] == 0
print("shared" if native.share_openmp() else "own")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_with_the_openmp_threads_of_torch():
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("shared", "own")


def test_slow_path_without_kernels_is_right_and_says_so_once():
    code = """
import sys, warnings
sys.modules["secateur.kernels._native"] = None
import numpy as np
from secateur.kernels import packing as P, native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert native.load_native() is None and native.load_native() is None and native.isa() == "python"
assert len(caught) == 1 and "no compiled kernels" in str(caught[0].message)
blob = np.load(sys.argv[1])["blob"]
x = np.load(sys.argv[1])["x"]
np.save(sys.argv[2], P.linear(blob, x, activation="gelu"))
"""
    import tempfile

    blob, x = layer()
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/in.npz", blob=blob, x=x)
        subprocess.run([sys.executable, "-c", code, f"{folder}/in.npz", f"{folder}/out.npy"], check=True, timeout=120)
        assert np.allclose(np.load(f"{folder}/out.npy"), P.linear(blob, x, activation="gelu"), rtol=1e-4, atol=1e-4)
