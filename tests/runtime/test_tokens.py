"""Compiled models with a schedule of tokens: they answer as before, and keep it when they are saved."""

import pytest
import torch

import secateur
from secateur.dynamic import all_tokens, prune_tokens
from secateur.torch.tokens.install import tokens_of
from tests import zoo


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, zoo.VOCAB, (3, 30), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, -7:] = 0
    return {"input_ids": ids, "attention_mask": seen}


@pytest.mark.parametrize("traced", [False, True])
def test_a_compiled_model_keeps_to_its_schedule(traced, batch, tmp_path):
    host = secateur.open(zoo.bert(), batch)
    host.apply(secateur.prune(host, secateur.criteria.magnitude, secateur.Element(), 0.8))
    model = prune_tokens(host, [70, 40]).model
    fast = secateur.runtime.compile(model, measure=False, example=batch if traced else None)
    with torch.no_grad():
        expected = model(**batch).logits
        with all_tokens():
            assert (model(**batch).logits - expected).abs().max() > 1e-3
        assert torch.allclose(fast(**batch).logits, expected, atol=1e-5)
        secateur.runtime.save(fast, tmp_path / "fast")
        again = secateur.runtime.load(tmp_path / "fast")
        assert tokens_of(again).schedule == tokens_of(model).schedule
        assert torch.allclose(again(**batch).logits, expected, atol=1e-5)
    assert fast.secateur_report.blocks == 0
    assert "a schedule takes tokens away inside of them" in fast.summary()
