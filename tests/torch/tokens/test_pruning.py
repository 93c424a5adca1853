"""Pruned tokens against loops written by hand: post-LN blocks, pre-LN blocks, windows and rotary positions."""

import pytest
import torch

from secateur.token_schedule import schedule_of
from secateur.torch.tokens.install import install
from tests import zoo
from tests.torch.tokens import by_hand

LENGTHS = ([20, 20, 20], [20, 13, 4], [1, 2, 9])


def padded(lengths, left=False, seed=0):
    """Texts of these lengths in one batch: ids and mask."""
    longest = max(lengths)
    ids = torch.randint(3, zoo.VOCAB, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length if left else 0 : None if left else length] = 1
    return ids * mask, mask


def modernbert(**options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = {**sizes, **special, "vocab_size": zoo.VOCAB, "max_position_embeddings": 64, "local_attention": 8}
    return zoo.random_model("ModernBertForSequenceClassification", {**config, **options})


def with_schedule(model, wanted, sites, **options):
    blocks = model.get_submodule(sites.stack)
    install(model, schedule_of(wanted, len(blocks), **options), sites)
    return model


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("wanted", ["exact", "fast", [70, 40, 20]])
def test_a_post_ln_model_leaves_out_what_the_loop_leaves_out(wanted, lengths, left):
    model, (ids, mask) = zoo.bert(), padded(lengths, left)
    with torch.no_grad():
        expected = by_hand.bert(model, ids, mask, schedule_of(wanted, 3).keep)
        with_schedule(model, wanted, by_hand.BERT)
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wanted", ["exact", "fast", [60, 30, 30]])
def test_a_pre_ln_model_leaves_them_out_in_the_middle_of_the_block(wanted):
    model = zoo.build("vit", cls="ViTModel", image_size=48)
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand.vit(model, images, schedule_of(wanted, 3).keep)
        with_schedule(model, wanted, by_hand.VIT)
        states = model(images).last_hidden_state
    assert states.shape[1] == 1
    torch.testing.assert_close(states[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("wanted", ["exact", "fast", [80, 50, 20]])
def test_windows_and_rotary_positions_follow_the_tokens_that_are_left(wanted, lengths):
    model, (ids, mask) = modernbert(), padded(lengths)
    with torch.no_grad():
        expected = by_hand.modernbert(model, ids, mask, schedule_of(wanted, 4).keep)
        with_schedule(model, wanted, by_hand.MODERNBERT)
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "sites"), [(zoo.bert, by_hand.BERT), (modernbert, by_hand.MODERNBERT)], ids=["bert", "modernbert"]
)
@pytest.mark.parametrize("left", [False, True])
def test_padding_goes_before_any_token(make, sites, left):
    model = make()
    ids, mask = padded([36, 10, 18], left)
    with torch.no_grad():
        dense = model(ids, mask).logits
        with_schedule(model, [50, 50], sites)
        pruned = model(ids, mask).logits
    assert pruned.isfinite().all()
    # half of 36 tokens holds each real one of the last two texts, but for the first place of padding on the left
    whole = [1] if left else [1, 2]
    torch.testing.assert_close(pruned[whole], dense[whole], rtol=0, atol=1e-6)
    assert (pruned[0] - dense[0]).abs().max() > 1e-5


def test_what_a_window_hides_is_ranked_by_the_block_before():
    """All 18 tokens fit in a window but for far ones, which a count from the window alone would lose to padding."""
    model = modernbert(local_attention=4)
    ids, mask = padded([40, 18])
    with torch.no_grad():
        dense = model(ids, mask).logits
        with_schedule(model, [100, 45, 45], by_hand.MODERNBERT)
        torch.testing.assert_close(model(ids, mask).logits[1], dense[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "ones", "bool", "4D bool", "4D numbers", "4D of one row"])
def test_masks_of_every_kind_give_one_answer(kind):
    model, (ids, mask) = zoo.bert(), padded([20, 20])
    four = mask[:, None, None].expand(2, 1, 20, 20).bool()
    forms = {
        "none": None,
        "ones": mask,
        "bool": mask.bool(),
        "4D bool": four,
        "4D numbers": torch.zeros(2, 1, 20, 20),
        "4D of one row": four[:, :, :1],
    }
    with torch.no_grad():
        expected = by_hand.bert(model, ids, mask, schedule_of("fast", 3).keep)
        with_schedule(model, "fast", by_hand.BERT)
        torch.testing.assert_close(model(ids, forms[kind]).logits, expected, rtol=0, atol=1e-6)


def test_a_4d_mask_hides_the_padding_that_a_2d_mask_hides():
    model, (ids, mask) = zoo.bert(), padded([20, 7])
    with_schedule(model, "fast", by_hand.BERT)
    four = mask[:, None, None].expand(2, 1, 20, 20)
    added = torch.where(four == 1, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, mask).logits
        for form in (four.bool(), added, added[:, :, :1]):
            torch.testing.assert_close(model(ids, form).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 40])
def test_shortest_and_longest_texts(length):
    model, (ids, mask) = zoo.bert(), padded([length, 1])
    with torch.no_grad():
        expected = by_hand.bert(model, ids, mask, schedule_of("fast", 3).keep)
        with_schedule(model, "fast", by_hand.BERT)
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=0, atol=1e-6)


def test_embeddings_and_positional_arguments_are_taken_as_ids_are():
    model, (ids, mask) = zoo.bert(), padded([12, 5])
    with_schedule(model, "fast", by_hand.BERT)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        given = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(ids, mask).logits, expected)
        torch.testing.assert_close(model(inputs_embeds=given, attention_mask=mask).logits, expected)
        assert torch.equal(model(ids, mask, return_dict=False)[0], expected)
