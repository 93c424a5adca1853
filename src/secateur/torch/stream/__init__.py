"""One-shot pruning of a model larger than memory, block by block, resumable."""
