"""Schedules of tokens on hosts: families that take one answer as they did, and others are refused with the reason."""

import functools

import pytest
import torch
import transformers
from torch import nn

import secateur
from secateur import dynamic
from secateur.dynamic.find_sites import Found
from secateur.dynamic.tokens import sites_of
from secateur.errors import ModelError
from secateur.token_schedule import TokenSchedule
from secateur.torch.tokens.install import tokens_of
from tests import zoo
from tests.torch.tokens import by_hand
from tests.torch.tokens.test_installing import answer, hooks_of
from tests.torch.tokens.test_pruning import modernbert, padded

TEXT = {"vocab_size": zoo.VOCAB, "max_position_embeddings": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = {**TEXT, "hidden_size": 32, "intermediate_size": 48}


def family(name):
    """A tiny text classifier that reads its first token."""
    if name == "modernbert":
        return modernbert()
    if name == "distilbert":
        sizes = {"vocab_size": zoo.VOCAB, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
        return zoo.random_model("DistilBertForSequenceClassification", {**sizes, "max_position_embeddings": 40})
    if name == "roberta":
        sizes = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 44}
        return zoo.random_model("RobertaForSequenceClassification", sizes)
    if name == "electra":
        return zoo.random_model("ElectraForSequenceClassification", {**SMALL, "embedding_size": 16})
    return zoo.bert()


@functools.cache
def host(name):
    if name in ("vit", "dinov2", "deit"):
        classes = {"vit": "ViT", "dinov2": "Dinov2", "deit": "DeiT"}
        model = zoo.build(name, cls=f"{classes[name]}ForImageClassification", image_size=48, num_labels=3)
    else:
        model = family(name)
    return secateur.open(model)


@functools.cache
def found(name):
    return sites_of(host(name))


TEXTS = ["bert", "roberta", "distilbert", "electra", "modernbert"]
WHERE = {
    "bert": ("attention", ""),
    "roberta": ("attention", ""),
    "distilbert": ("sa_layer_norm", ""),
    "electra": ("attention", ""),
    "modernbert": ("", "mlp"),
    "vit": ("", "mlp"),
    "deit": ("", "mlp"),
}


@pytest.mark.parametrize("name", WHERE)
def test_tokens_leave_after_the_attention_of_each_family(name):
    sites = found(name).sites
    assert (sites.inner, sites.feed_forward) == WHERE[name]
    assert found(name).pools_first
    assert found(name).takes_padding == (name in TEXTS)


def test_the_sites_of_bert_are_those_that_one_writes_by_hand():
    assert found("bert") == Found(by_hand.BERT, 3, pools_first=True, takes_padding=True)
    assert found("modernbert").sites == by_hand.MODERNBERT


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_the_pooled_token_alone_after_the_last_attention_changes_no_answer(name, left):
    pruned, dense = dynamic.prune_tokens(host(name), "exact", found=found(name)), host(name)
    for lengths in ([31, 7, 1], [2, 1], [40, 40]):
        ids, mask = padded(lengths, left)
        batch = {"input_ids": ids + (1 - mask) * (dense.model.config.pad_token_id or 0), "attention_mask": mask}
        with torch.no_grad():
            expected, got = dense.model(**batch).logits, pruned.model(**batch).logits
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_images_lose_nothing_by_the_exact_schedule(name):
    pruned = dynamic.prune_tokens(host(name), "exact", found=found(name))
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected = host(name).model(pixel_values=images).logits
        torch.testing.assert_close(pruned.model(pixel_values=images).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_merging_nothing_changes_no_answer(name):
    merged = dynamic.merge_tokens(host(name), [100], found=found(name))
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected = host(name).model(pixel_values=images).logits
        torch.testing.assert_close(merged.model(pixel_values=images).logits, expected, rtol=0, atol=1e-6)
        few = dynamic.merge_tokens(host(name), [75], found=found(name)).model(pixel_values=images).logits
    assert 1e-5 < (few - expected).abs().max() < 0.5 * expected.abs().max()


def test_the_host_stays_as_it_is_and_the_copy_has_the_schedule():
    dense, batch = host("bert"), padded([20, 9])
    before = answer(dense.model, batch)
    pruned = dynamic.prune_tokens(dense, "fast", found=found("bert"))
    assert tokens_of(dense.model) is None
    assert hooks_of(dense.model) == {}
    assert tokens_of(pruned.model).schedule == TokenSchedule((70, 35, 25))
    assert torch.equal(answer(dense.model, batch), before)
    assert not torch.equal(answer(pruned.model, batch), before)
    with dynamic.all_tokens():
        assert torch.equal(answer(pruned.model, batch), before)


def test_a_host_with_a_schedule_gets_another_one_in_its_place():
    once = dynamic.prune_tokens(host("bert"), "fast", found=found("bert"))
    twice, direct = dynamic.prune_tokens(once, "mild"), dynamic.prune_tokens(host("bert"), "mild", found=found("bert"))
    batch = padded([20, 9])
    assert torch.equal(answer(twice.model, batch), answer(direct.model, batch))


def test_an_example_without_a_mask_teaches_the_sites_of_masks():
    model = zoo.bert()
    bare = secateur.open(model, example={"input_ids": torch.randint(3, zoo.VOCAB, (2, 7))})
    assert sites_of(bare) == found("bert")
    assert answer(dynamic.prune_tokens(bare, "fast").model, padded([20, 9])).isfinite().all()


def refusal(model, what=dynamic.prune_tokens, example=None, **options):
    with pytest.raises(ModelError) as caught:
        what(secateur.open(model, example=example), **options)
    return str(caught.value)


@pytest.mark.parametrize("cls", ["BertModel", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_a_model_that_reads_every_token_is_not_pruned(cls):
    said = refusal(zoo.build("bert", cls=cls))
    assert said.startswith(f"a {cls} reads other tokens than the first after its last block")


def test_a_modernbert_that_reads_the_mean_of_tokens_is_not_pruned():
    assert "reads other tokens than the first" in refusal(modernbert(classifier_pooling="mean"))


@pytest.mark.parametrize("cls", ["MPNetForSequenceClassification", "DebertaV2ForSequenceClassification"])
def test_attention_without_the_interface_is_refused(cls):
    said = refusal(zoo.random_model(cls, SMALL))
    assert f"a {cls} has attention of its own" in said
    assert said.endswith("prune its heads, neurons or layers with secateur.prune")


def test_blocks_that_know_their_places_are_refused():
    config = {**zoo.FAMILIES["vit"][1], "image_size": 48, "use_relative_position_bias": True}
    said = refusal(zoo.random_model("BeitForImageClassification", config))
    assert "knows the places of its tokens by itself (relative positions or windows; reordered ones change its" in said


def test_two_stacks_of_blocks_are_refused():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
    said = refusal(zoo.random_model("SwinForImageClassification", {**sizes, "window_size": 4}))
    assert "layers.0.blocks" in said
    assert "a schedule is for one stack of blocks" in said


def test_shared_layers_and_models_of_plain_pytorch_are_refused():
    albert = zoo.build("albert", cls="AlbertForSequenceClassification")
    assert "its blocks share their weights" in refusal(albert)
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert "no list of blocks was found" in refusal(plain, example={"input": torch.randn(2, 8)})


def test_texts_are_not_merged_and_images_read_as_a_whole_are_not_pruned():
    with pytest.raises(ModelError, match="reads texts with padding.*leave tokens of texts out instead"):
        dynamic.merge_tokens(host("bert"), found=found("bert"))
    with pytest.raises(
        ModelError, match="a Dinov2ForImageClassification reads other tokens than the first.*merge_tokens"
    ):
        dynamic.prune_tokens(host("dinov2"), found=found("dinov2"))


def test_images_with_a_table_of_positions_are_not_merged():
    config = {**zoo.FAMILIES["vit"][1], "image_size": 48, "use_shared_relative_position_bias": True}
    said = refusal(zoo.random_model("BeitForImageClassification", config), dynamic.merge_tokens)
    assert "the blocks read a table of their tokens" in said


def test_a_decoder_with_a_cache_is_refused_for_what_it_reads():
    model = zoo.build("llama", cls="LlamaForSequenceClassification", pad_token_id=0)
    assert model.config.use_cache
    assert "reads other tokens than the first" in refusal(model)


def test_a_schedule_that_merges_more_than_half_of_the_tokens_at_once_is_refused_when_it_is_made():
    with pytest.raises(ModelError, match="at most half of them can go"):
        dynamic.merge_tokens(host("vit"), [30, 30, 30], found=found("vit"))


def test_what_is_no_pytorch_host_is_refused():
    with pytest.raises(ModelError, match="tokens are pruned in PyTorch models of transformers"):
        dynamic.prune_tokens(object())


def test_a_model_of_too_few_positions_is_refused():
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**SMALL, "max_position_embeddings": 8})
    )
    example = {"input_ids": torch.randint(3, zoo.VOCAB, (2, 7))}
    assert "takes 8 tokens at most, too few to take any away" in refusal(model.eval(), example=example)
