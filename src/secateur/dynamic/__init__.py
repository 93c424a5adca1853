"""What depends on the input: fewer tokens on their way through a model, and easy inputs answered with less work."""

from secateur.dynamic.tokens import merge_tokens, prune_tokens, without_schedule
from secateur.torch.tokens.install import all_tokens

__all__ = ["all_tokens", "merge_tokens", "prune_tokens", "without_schedule"]
