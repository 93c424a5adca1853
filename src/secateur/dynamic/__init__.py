"""What depends on the input: fewer tokens on their way through a model, and easy inputs answered with less work."""

from secateur.dynamic.cascade import Answer, Cascade, answer, calibrate
from secateur.dynamic.exits import EarlyExit, fit_exit
from secateur.dynamic.tokens import merge_tokens, prune_tokens, without_schedule
from secateur.torch.tokens.install import all_tokens

__all__ = [
    "Answer",
    "Cascade",
    "EarlyExit",
    "all_tokens",
    "answer",
    "calibrate",
    "fit_exit",
    "merge_tokens",
    "prune_tokens",
    "without_schedule",
]
