"""Criteria: pure functions of arrays that score weights or units.

A criterion names what it needs by its parameters: `weight`, or a quantity of `secateur.stats`. A criterion of weights
returns the contribution of each weight, and the score of a set of weights is the absolute value of the sum of their
contributions. A criterion of units returns a score for each unit. What scores higher is kept.
"""

from secateur.criteria.activation import activation
from secateur.criteria.attention import (
    attention_confidence,
    attention_entropy,
    attention_mass,
    attention_output,
    attention_softmax,
)
from secateur.criteria.brain_damage import brain_damage
from secateur.criteria.fisher import fisher
from secateur.criteria.gradient import gradient
from secateur.criteria.magnitude import magnitude, threshold
from secateur.criteria.ria import ria
from secateur.criteria.routing import routed_mass, routed_saliency, routing_frequency
from secateur.criteria.taylor import taylor
from secateur.criteria.wanda import wanda

__all__ = [
    "activation",
    "attention_confidence",
    "attention_entropy",
    "attention_mass",
    "attention_output",
    "attention_softmax",
    "brain_damage",
    "fisher",
    "gradient",
    "magnitude",
    "ria",
    "routed_mass",
    "routed_saliency",
    "routing_frequency",
    "taylor",
    "threshold",
    "wanda",
]
