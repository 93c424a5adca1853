"""What models with a schedule of tokens must give, written as loops over texts, blocks and tokens, without any hook."""

import torch
from torch.nn.functional import cosine_similarity

from secateur.torch.tokens.sites import TokenSites

BERT = TokenSites("bert.encoder.layer", "attention", "", {"[0][1]": (2, 3)})
VIT = TokenSites("layers", "", "mlp", {})
TABLES = {"[1]['position_embeddings'][0]": (1,), "[1]['position_embeddings'][1]": (1,)}
MODERNBERT = TokenSites("model.layers", "", "mlp", {"[1]['attention_mask']": (2, 3), **TABLES})


def attention(query, key, value, heads, allowed=None, sizes=None):
    """Output (tokens, width) and weights (heads, queries, keys) of one text; allowed (queries, keys)."""
    q, k, v = (x.reshape(len(x), heads, -1).transpose(0, 1) for x in (query, key, value))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e9)
    if sizes is not None:
        scores = scores + sizes.log()
    weights = scores.softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(len(query), -1), weights


def kept(score, real, count):
    """The first token, then those with the highest scores; padding only where nothing else is left."""
    others = sorted(range(1, len(score)), key=lambda i: -float(score[i]) if real[i] else 1.0)
    return [0, *others[: count - 1]]


def count_of(percent, length):
    return -(-length * percent // 100)


def bert(model, ids, mask, percents):
    """Logits of a BERT classifier, (texts, labels)."""
    return torch.stack([_bert(model, *row, percents) for row in zip(ids, mask.bool(), strict=True)])


def _bert(model, ids, real, percents):
    x = model.bert.embeddings(input_ids=ids[None])[0]
    for number, block in enumerate(model.bert.encoder.layer):
        own, out = block.attention.self, block.attention.output
        allowed = real.expand(len(x), len(x))
        mixed, weights = attention(own.query(x), own.key(x), own.value(x), own.num_attention_heads, allowed)
        x = out.LayerNorm(out.dense(mixed) + x)
        is_last = number == len(percents) - 1
        chosen = [0] if is_last else kept(weights[:, 0].mean(0), real, count_of(percents[number], len(ids)))
        x, real = x[chosen], real[chosen]
        x = block.output.LayerNorm(block.output.dense(block.intermediate(x)) + x)
    return model.classifier(model.bert.pooler(x[None]))[0]


def vit(model, images, percents):
    """The pooled state after the last norm of a ViT, (images, width)."""
    starts = model.embeddings(images)
    return torch.stack([_vit(model, x, percents) for x in starts])


def _vit(model, x, percents):
    length = len(x)
    for number, block in enumerate(model.layers):
        own, y = block.attention, block.layernorm_before(x)
        mixed, weights = attention(own.q_proj(y), own.k_proj(y), own.v_proj(y), own.num_attention_heads)
        x = x + own.o_proj(mixed)
        is_last = number == len(percents) - 1
        score, real = weights[:, 0].mean(0), [True] * len(x)
        x = x[[0] if is_last else kept(score, real, count_of(percents[number], length))]
        x = x + block.mlp(block.layernorm_after(x))
    return model.layernorm(x)[0]


def modernbert(model, ids, mask, percents):
    """Logits of a ModernBERT classifier that reads the first token, (texts, labels)."""
    return torch.stack([_modernbert(model, *row, percents) for row in zip(ids, mask.bool(), strict=True)])


def _modernbert(model, ids, real, percents):
    inner, places, earlier = model.model, torch.arange(len(ids)), None
    x = inner.embeddings(input_ids=ids[None])[0]
    for number, block in enumerate(inner.layers):
        own, heads = block.attn, model.config.num_attention_heads
        cos, sin = inner.rotary_emb(x[None], places[None], block.attention_type)
        q, k, v = own.Wqkv(block.attn_norm(x)).reshape(len(x), 3, -1).unbind(1)
        far = (places[:, None] - places[None]).abs()
        window = far < own.sliding_window if own.sliding_window else far >= 0
        q, k = (_turned(part, heads, cos[0], sin[0]) for part in (q, k))
        mixed, weights = attention(q, k, v, heads, window & real)
        x = x + own.Wo(mixed)
        score = weights[:, 0].mean(0)
        if bool((real & ~window[0]).any()):  # a window hides tokens from the first
            score = earlier
        is_last = number == len(percents) - 1
        chosen = [0] if is_last else kept(score, real, count_of(percents[number], len(ids)))
        x, real, places, earlier = x[chosen], real[chosen], places[chosen], score[chosen]
        x = x + block.mlp(block.mlp_norm(x))
    return model.classifier(model.head(inner.final_norm(x)[None, 0]))[0]


def _turned(x, heads, cos, sin):
    """Rotary positions of (tokens, width): pairs are a half of the head apart."""
    x = x.reshape(len(x), heads, -1)
    a, b = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]).reshape(len(x), -1)


# -- merging (Bolya et al., 2023) -------------------------------------------------------------------------------------


def merge(states, keys, groups, gone):
    """One merging of one image: states (tokens, width), keys, and for each token the set of what it stands for.

    The tokens at even places but the first take, those at odd places give.
    """
    giving, taking = range(1, len(states), 2), range(2, len(states), 2)
    best = {}
    for i in giving:
        best[i] = max((float(cosine_similarity(keys[i], keys[j], dim=0)), j) for j in taking)
    ranked = sorted(giving, key=lambda i: -best[i][0])
    joined = {j: [j] for j in taking}
    for i in ranked[:gone]:
        joined[best[i][1]].append(i)
    parts = [[0], *([i] for i in ranked[gone:]), *joined.values()]
    merged = []
    for members in parts:
        weights = torch.tensor([float(len(groups[i])) for i in members])
        merged.append((states[members] * weights[:, None]).sum(0) / weights.sum())
    return torch.stack(merged), [set().union(*(groups[i] for i in members)) for members in parts]


def vit_merged(model, images, percents):
    """The states after the last norm of a ViT, (images, tokens, width): each patch has the state that it went into."""
    return torch.stack([_vit_merged(model, x, percents) for x in model.embeddings(images)])


def _vit_merged(model, x, percents):
    length, groups = len(x), [{i} for i in range(len(x))]
    for number, block in enumerate(model.layers):
        own, y = block.attention, block.layernorm_before(x)
        heads, keys = own.num_attention_heads, own.k_proj(y)
        sizes = torch.tensor([float(len(group)) for group in groups])
        mixed, _ = attention(own.q_proj(y), keys, own.v_proj(y), heads, sizes=sizes)
        x = x + own.o_proj(mixed)
        x = x + block.mlp(block.layernorm_after(x))
        gone = len(x) - count_of(percents[number], length)
        if gone:
            x, groups = merge(x, keys.reshape(len(x), heads, -1).mean(1), groups, gone)
    states = model.layernorm(x)
    place = {token: number for number, group in enumerate(groups) for token in group}
    return torch.stack([states[place[token]] for token in range(length)])
