"""Scores of the experts of a mixture, from what the router sends them and what they add to the residual stream."""

from secateur.arrays import Array, namespace


def routed_saliency(expert_output: Array, expert_routed: Array) -> Array:
    """E[|g_j(x) f_j(x)|] over the tokens x that are routed to expert j, shape (experts,): REAP (Lasby et al., 2025).

    An expert to which no token was routed scores 0.
    """
    xp = namespace(expert_routed)
    return xp.where(expert_routed > 0, expert_output / xp.where(expert_routed > 0, expert_routed, 1.0), 0.0)


def routed_mass(expert_output: Array) -> Array:
    """E[|g_j(x) f_j(x)|] over all tokens x, 0 for those that are not routed to expert j, shape (experts,):
    `routed_saliency` times `routing_frequency`.
    """
    return expert_output


def routing_frequency(expert_routed: Array) -> Array:
    """Share of the tokens that are routed to an expert, shape (experts,): the usual baseline (Muzio et al., 2024)."""
    return expert_routed
