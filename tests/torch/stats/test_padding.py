"""Which rows count where linear layers read: by position or by name, flattened, and in encoder-decoders."""

import warnings

import pytest
import torch
from torch import nn

import secateur
from secateur import Element, criteria
from secateur.errors import DataError
from secateur.layout import Layout
from secateur.repair import sparsegpt
from tests import zoo
from tests.torch import slow


class ByName(nn.Module):
    """A module that names the input of its linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.down(input=torch.relu(self.up(input=x)))


@pytest.mark.parametrize("options", [{"criterion": criteria.wanda}, {"repair": sparsegpt}])
def test_inputs_given_by_name_are_seen(options):
    torch.manual_seed(0)
    x = torch.rand(5, 8)
    host = secateur.open(ByName(), example=(x,))
    stats = host.collect(["act_sq", "gram"], [(x,)])
    torch.testing.assert_close(stats.mean("act_sq", "up.weight"), x.square().mean(0))
    torch.testing.assert_close(stats.mean("gram", "up.weight"), x.T @ x / 5)
    plan = secateur.prune(host, pattern=Element(), budget=0.5, data=[(x,)], **options)
    assert plan.masks["down.weight"].sum() == 32


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FLATTENED = {
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "DeepseekV3ForCausalLM": {
        **SIZES, "num_key_value_heads": 4, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": None,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("cls", ["OPTForCausalLM", *slow("DeepseekV3ForCausalLM")])
def test_padding_is_left_out_where_tokens_are_flattened(cls):
    """OPT multiplies (batch * positions, in), shared experts do, and latent attention (batch, 1, positions, in)."""
    torch.manual_seed(0)
    host = secateur.open(zoo.random_model(cls, FLATTENED[cls]))
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    needs = ["act_sq", "gram"]
    padded = host.collect(needs, [{"input_ids": ids, "attention_mask": mask}])
    short = [{"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate((9, 4))]
    plain = host.collect(needs, short)
    for need in needs:
        for name in plain.sums[need]:
            assert padded.counts[need][name] == plain.counts[need][name], name
            got, wanted = (torch.as_tensor(stats.mean(need, name)) for stats in (padded, plain))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


class Routed(nn.Module):
    """An expert that reads only some tokens, and a head that reads one row for each example."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        return self.head(x[:, 0] + self.expert(x.reshape(-1, 8)[::3]).sum())


def test_rows_that_are_no_tokens_of_the_batch_are_named():
    ids, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    host = secateur.open(Routed(), example={"input_ids": ids, "attention_mask": mask})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.collect(["act_sq"], [{"input_ids": ids, "attention_mask": mask}])
    mask[1, 4:] = 0
    with pytest.warns(UserWarning, match=r"padding counts in 1 linear layers.*such as expert, which read 6 rows"):
        stats = host.collect(["act_sq"], [{"input_ids": ids, "attention_mask": mask}])
    assert stats.counts["act_sq"] == {"expert.weight": 6, "head.weight": 2}


def equal_lengths():
    """Encoder and decoder inputs of one shape, padded differently: 13 tokens for the encoder, 11 for the decoder."""
    ids, mask = torch.randint(4, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    target, decoder = torch.randint(4, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    decoder[0, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target, "decoder_attention_mask": decoder}


ENCODER = ("encoder.", "EncDecAttention.k", "EncDecAttention.v")


@pytest.mark.parametrize("given", [True, False])
def test_encoder_and_decoder_have_each_their_own_padding(given):
    host = secateur.open(zoo.t5(num_layers=1, num_decoder_layers=1))
    batch = equal_lengths()
    if not given:
        del batch["decoder_attention_mask"]
    stats = host.collect(["act_sq", "attn_sum"], [batch])
    for name, count in stats.counts["act_sq"].items():
        read_by_encoder = name.startswith(ENCODER[0]) or any(part in name for part in ENCODER[1:])
        assert count == (13 if read_by_encoder else 11 if given else 18), name
    own = 11 if given else 18
    heads = {"encoder.L0.head": 13, "decoder.L0.head": own, "decoder.L0.EncDecAttention.head": own}
    assert stats.counts["attn_sum"] == heads


def test_a_layout_that_knows_no_decoder_is_refused_with_padding_only():
    host = secateur.open(zoo.t5(num_layers=1, num_decoder_layers=1))
    by_hand = secateur.open(host.model, layout=Layout.from_text(str(host.layout)))
    batch = equal_lengths()
    with pytest.raises(DataError, match="the layout does not say what reads the encoder"):
        by_hand.collect(["act_sq"], [batch])
    full = {key: torch.ones_like(value) for key, value in batch.items()}
    assert set(by_hand.collect(["act_sq"], [full]).counts["act_sq"].values()) == {18}
