"""Attention on the kernels: equality with torch's SDPA, which calls go to it, and what torch.compile sees."""

import pytest
import torch

from secateur import runtime
from secateur.kernels.native import load_native
from secateur.runtime.layers import attention as module
from tests import zoo

pytestmark = pytest.mark.skipif(load_native() is None, reason="needs the compiled kernels")


def heads(batch, count, tokens, width, seed=0):
    """(batch, count, tokens, width), laid out as a linear layer gives it."""
    torch.manual_seed(seed)
    return torch.randn(batch, tokens, count, width).transpose(1, 2)


def masks(batch, queries, keys):
    seen = torch.rand(batch, 1, queries, keys) < 0.7
    seen[0, 0, 0] = False  # a query that sees nothing
    yield None
    yield seen
    yield torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(batch, 1, queries, keys)
    yield torch.randn(batch, 4, queries, keys)
    yield torch.randn(1, 1, queries, keys)
    yield torch.randn(batch, 1, keys, queries).transpose(2, 3)


@pytest.mark.parametrize(("queries", "keys", "width"), [(8, 8, 16), (33, 33, 8), (20, 300, 13), (1, 5, 4)])
def test_equal_to_torch(queries, keys, width):
    from secateur.runtime.layers.operators import attention

    q, k, v = heads(2, 4, queries, width), heads(2, 2, keys, width, 1), heads(2, 2, keys, width, 2)
    for mask in masks(2, queries, keys):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        got = attention(q, k, v, mask, 0.3)
        assert got.shape == (2, queries, 4, width)
        torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_bad_calls():
    from secateur.runtime.layers.operators import attention

    q = heads(1, 3, 4, 8)
    with pytest.raises(ValueError, match="does not fit"):
        attention(q, heads(1, 2, 4, 8), heads(1, 2, 4, 8), None, 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        attention(q, q, heads(1, 3, 5, 8), None, 1.0)
    with pytest.raises(TypeError, match="takes float32"):
        attention(q.double(), q, q, None, 1.0)
    with pytest.raises(TypeError, match="float32 or bool, not torch.int64"):
        attention(q, q, q, torch.zeros(1, 1, 4, 4, dtype=torch.int64), 1.0)


def test_a_compiled_encoder(calls, tmp_path):
    model = zoo.pruned(zoo.bert(num_hidden_layers=2))
    fast = runtime.compile(model, tokens=32, measure=False)
    assert model.config._attn_implementation == "sdpa"
    assert fast.config._attn_implementation == module.NAME
    ids = torch.randint(4, 50, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    calls.clear()
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask)[0]
        torch.testing.assert_close(fast(input_ids=ids, attention_mask=mask)[0], expected, rtol=1e-4, atol=1e-5)
        assert calls["attention"] == 2
        torch.testing.assert_close(fast(ids[:, :5])[0], model(ids[:, :5])[0], rtol=1e-4, atol=1e-5)
        assert calls["attention"] == 4
        runtime.save(fast, tmp_path / "fast")
        again = runtime.load(tmp_path / "fast")
        torch.testing.assert_close(again(input_ids=ids, attention_mask=mask)[0], expected, rtol=1e-4, atol=1e-5)
    assert calls["attention"] == 6


def test_a_causal_decoder_attends_as_before(calls):
    model = zoo.pruned(zoo.llama(num_hidden_layers=2))
    fast = runtime.compile(model, tokens=32, measure=False)
    calls.clear()
    ids = torch.randint(4, 50, (1, 16))
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        mask = torch.ones(2, 16, dtype=torch.int64)
        mask[0, :6] = 0
        ids = ids.expand(2, -1)
        got, expected = (m(ids, attention_mask=mask).logits[1] for m in (fast, model))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        a, b = (m.generate(ids[:1, :9], max_new_tokens=5, do_sample=False) for m in (fast, model))
    assert a.tolist() == b.tolist()
    # Where a mask says which keys are seen, and for the tokens that are added one by one, all but the first.
    assert calls["attention"] == 2 + 2 * 4


@pytest.mark.parametrize(
    "change",
    [{"softcap": 1.0}, {"dropout": 0.1}, {"is_causal": True}, {"sliding_window": 4}, {"position_bias": 1}],
)
def test_what_goes_to_torch(change):
    q = heads(1, 2, 16, 8)
    holder = torch.nn.Module()
    holder.is_causal = False
    assert module._fits(holder, q, q, q, None, {"scaling": 1.0, "dropout": 0.0})
    assert not module._fits(holder, q, q, q, None, {"scaling": 1.0, **change})
    assert not module._fits(torch.nn.Module(), q, q, q, None, {})  # transformers takes a silent module for causal
    assert not module._fits(holder, q.clone().requires_grad_(), q, q, None, {})
    assert not module._fits(holder, q, q, q, torch.ones(16, 16, dtype=torch.bool), {})


def test_opaque_to_export():
    from secateur.runtime.layers.operators import attention

    class Net(torch.nn.Module):
        def forward(self, q):
            return attention(q, q, q, None, 0.5)

    q = heads(1, 2, 16, 8)
    program = torch.export.export(Net(), (q,))
    assert any("secateur.attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(q), Net()(q))
