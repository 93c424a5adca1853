"""Attention scores of heads. With A = softmax(Q K^T) over real tokens, the textbook score of a head is the sum over
i, j of Attention(head, Q_i, K_j, V_j). If that means the softmax weights alone, it is the same for every head, because
each row of A sums to one; it distinguishes heads when V is part of it. The functions here are the useful meanings.
"""

from secateur.arrays import Array, namespace


def attention_mass(attn_mass: Array) -> Array:
    """Sum over i, j of |A_ij V_j|, per query token, shape (heads,): the mass that a head moves."""
    return attn_mass


def attention_output(attn_output: Array) -> Array:
    """Sum over i of |A_i V W_O|, per query token, shape (heads,): what a head writes after its output projection."""
    return attn_output


def attention_confidence(attn_confidence: Array) -> Array:
    """E[max_j A_ij], shape (heads,): heads that attend to one position are kept (Voita et al., 2019)."""
    return attn_confidence


def attention_entropy(attn_entropy: Array) -> Array:
    """exp(-entropy of A_i), shape (heads,): heads whose attention is spread out are removed."""
    return namespace(attn_entropy).exp(-attn_entropy)


def attention_softmax(attn_sum: Array) -> Array:
    """Sum over j of A_ij, shape (heads,). It is 1 for every head, and here to show that the literal formula ranks
    nothing; use `attention_mass`."""
    return attn_sum
