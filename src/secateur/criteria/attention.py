"""Attention scores per head. With A = softmax(Q K^T) and padding left out, the textbook score of a head is the sum over
i, j of Attention(head, Q_i, K_j, V_j). Read as the softmax weights alone it is the same for every head, because
each row of A sums to one; it says something when V is part of it. The functions here are the useful readings.
"""

from secateur.arrays import Array, namespace


def attention_mass(attn_mass: Array) -> Array:
    """Sum over i, j of |A_ij V_j|, per query token, shape (heads,): the mass that a head moves."""
    return attn_mass


def attention_output(attn_output: Array) -> Array:
    """Sum over i of |A_i V W_O|, per query token, shape (heads,): what a head writes after its output projection."""
    return attn_output


def attention_confidence(attn_confidence: Array) -> Array:
    """E[max_j A_ij], shape (heads,): heads that look at one place stay (Voita et al., 2019)."""
    return attn_confidence


def attention_entropy(attn_entropy: Array) -> Array:
    """exp(-entropy of A_i), shape (heads,): heads whose attention is spread out go."""
    return namespace(attn_entropy).exp(-attn_entropy)


def attention_softmax(attn_sum: Array) -> Array:
    """Sum over j of A_ij, shape (heads,). Constant by construction, kept so that the literal formula can be seen to
    rank nothing; use `attention_mass`."""
    return attn_sum
