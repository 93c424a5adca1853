"""Compiled models compared with those that they were made of."""

import threading

import torch

from secateur.runtime.layers import fused
from secateur.runtime.run.chain import leaves


def compare(fast, model, batch, tolerance=1e-5):
    """Both give the same for a batch; the tensors that the compiled model gives."""
    with torch.inference_mode():
        got, expected = ([t for t in leaves(m(**batch)) if isinstance(t, torch.Tensor)] for m in (fast, model))
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        largest = float(b.abs().nan_to_num().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest, equal_nan=True)
    return got


def compare_from_threads(fast, model, batches, turns=10):
    """Both give the same where threads call the compiled model at once, each with a batch of its own."""
    barrier, right = threading.Barrier(len(batches)), []

    def work(batch):
        for _ in range(turns):
            barrier.wait(timeout=30)
            compare(fast, model, batch)
            right.append(batch)

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == turns * len(batches)


def fused_modules(model):
    """Paths of the modules that run as one call."""
    return list(fused.fused_modules(model))
