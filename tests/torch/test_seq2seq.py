"""Encoder-decoders whose batches hold labels and no decoder inputs, as data for fine-tuning does."""

import pytest
import torch

import secateur
from secateur import Element, Unit, criteria
from secateur.torch.base.batches import run, with_decoder_inputs
from tests import zoo


def t5():
    return zoo.t5(num_layers=1, num_decoder_layers=1)


def bart(kind="ConditionalGeneration"):
    return zoo.build("bart", f"BartFor{kind}", max_position_embeddings=40)


def m2m():
    """A model whose forward pass shifts labels by a function of its module, not by a method."""
    return zoo.build("bart", "M2M100ForConditionalGeneration", max_position_embeddings=40)


def labelled():
    torch.manual_seed(0)
    ids, mask, labels = torch.randint(4, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long), torch.randint(4, 50, (2, 9))
    mask[1, 5:] = 0
    labels[0, 4:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("make", [t5, bart, m2m])
def test_outputs_are_those_that_the_model_gives_with_labels(make):
    model, batch = make(), labelled()
    with torch.no_grad():
        wanted = model(**batch).logits
        got = run(model, batch).logits
    torch.testing.assert_close(got, wanted)


def test_a_classifier_makes_its_decoder_inputs_itself():
    batch = {**labelled(), "labels": torch.tensor([0, 1])}
    assert with_decoder_inputs(bart("SequenceClassification"), batch) is batch
    assert with_decoder_inputs(zoo.llama(), labelled()).keys() == labelled().keys()


def test_every_need_is_collected_and_plans_are_verified():
    host, batch = secateur.open(t5()), labelled()
    stats = host.collect(["act_sq", "attn_mass", "grad"], [batch])
    assert stats.counts["act_sq"]["encoder.block.0.layer.0.SelfAttention.q.weight"] == 14
    assert stats.counts["act_sq"]["decoder.block.0.layer.1.EncDecAttention.k.weight"] == 14
    assert stats.counts["act_sq"]["decoder.block.0.layer.0.SelfAttention.q.weight"] == 13
    assert secateur.prune(host, criteria.wanda, Element(), 0.5, [batch]).masks
    plan = secateur.prune(host, criteria.activation, Unit("ffn"), 0.5, [batch])
    assert secateur.verify(host, plan, [batch]).batches == 1
    tokens = secateur.prune(host, criteria.magnitude, Unit("vocab"), 0.2)
    assert secateur.verify(host, tokens, [batch]).batches == 1
