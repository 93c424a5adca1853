"""Merged tokens against loops written by hand (Bolya et al., 2023)."""

import pytest
import torch

from secateur.errors import ModelError
from secateur.token_schedule import TokenSchedule, schedule_of
from secateur.torch.tokens.call import TokenCall
from secateur.torch.tokens.install import all_tokens
from secateur.torch.tokens.merge import merged
from tests import zoo
from tests.torch.tokens import by_hand
from tests.torch.tokens.test_pruning import with_schedule


def call_of(keep, keys, **options):
    call = TokenCall(TokenSchedule(tuple(keep), "merge", **options), by_hand.VIT, length=keys.shape[1], block=0)
    call.keys = keys
    return call


@pytest.mark.parametrize("tokens", [5, 8, 17])
def test_one_merging_averages_the_most_alike_pairs(tokens):
    generator = torch.Generator().manual_seed(tokens)
    states, keys = torch.randn(2, tokens, 6, generator=generator), torch.randn(2, tokens, 4, generator=generator)
    call = call_of([60], keys, pooled=False)
    got = merged(call, states)
    gone = tokens - by_hand.count_of(60, tokens)
    assert gone > 0
    for row in range(2):
        expected, groups = by_hand.merge(states[row], keys[row], [{i} for i in range(tokens)], gone)
        torch.testing.assert_close(got[row], expected)
        assert call.sizes[row].tolist() == [len(group) for group in groups]
        assert [int(place) for place in call.source[row]] == [
            next(number for number, group in enumerate(groups) if token in group) for token in range(tokens)
        ]


def test_three_tokens_join_the_one_that_they_are_alike():
    """Keys of tokens 1, 3 and 5 point where that of token 2 does; the means are simple."""
    keys = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [0, 3], [-1, 0], [0, 1], [-1, -1]]])
    states = torch.tensor([[0.0, 1, 2, 3, 4, 6, 7]])[:, :, None]
    call = call_of([57], keys)
    assert merged(call, states)[0, :, 0].tolist() == [0, 3, 4, 7]
    assert call.sizes.tolist() == [[1, 4, 1, 1]]


def test_more_than_half_of_the_tokens_cannot_go_at_once():
    with pytest.raises(ModelError, match="5 of 9 tokens are to be merged after block 0; at most half of them can go"):
        merged(call_of([40], torch.randn(1, 9, 4)), torch.randn(1, 9, 6))


@pytest.mark.parametrize("wanted", [[100, 100, 100], [80, 60, 60], "fast", [60, 40, 30]])
def test_a_model_merges_what_the_loop_merges(wanted):
    model = zoo.build("vit", cls="ViTModel", image_size=48)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = by_hand.vit_merged(model, images, schedule_of(wanted, 3).keep)
        with_schedule(model, wanted, by_hand.VIT, method="merge", pooled=False)
        states = model(images).last_hidden_state
    assert states.shape == (2, 37, 32)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_the_pooled_token_alone_is_what_is_pooled_among_all():
    model = zoo.build("vit", cls="ViTModel", image_size=48)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        with_schedule(model, [80, 60, 60], by_hand.VIT, method="merge", pooled=False)
        expected = model(images).last_hidden_state[:, :1]
        with_schedule(model, [80, 60, 60], by_hand.VIT, method="merge")
        torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=0, atol=1e-6)


def test_equal_patches_merge_without_a_change():
    """A patch that stands for four equal ones counts four times in the softmax, so nothing changes."""
    model = zoo.build("vit", cls="ViTModel", image_size=48)
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
        images = torch.randn(2, 3, 1, 1).expand(2, 3, 48, 48)
        dense = model(images).last_hidden_state
        with_schedule(model, [60, 40, 30], by_hand.VIT, method="merge", pooled=False)
        torch.testing.assert_close(model(images).last_hidden_state, dense, rtol=0, atol=1e-5)


def test_a_mask_and_merged_tokens_do_not_go_together():
    model = zoo.build("vit", cls="ViTModel", image_size=32)
    with_schedule(model, [80, 60, 60], by_hand.VIT, method="merge")
    images, mask = torch.randn(1, 3, 32, 32), torch.ones(1, 17).index_fill(1, torch.tensor([4]), 0)
    with pytest.raises(ModelError, match="tokens that are merged take no mask"):
        model(images, attention_mask=mask)
    with pytest.raises(ModelError, match="tokens that are merged take no mask"):
        model(images, None, None, mask)
    with all_tokens():
        assert model(images, attention_mask=mask).last_hidden_state.isfinite().all()
