"""One-shot pruning of a model larger than memory, block by block, resumable."""

from secateur.torch.stream.run import prune_folder, prune_loaded

__all__ = ["prune_folder", "prune_loaded"]
