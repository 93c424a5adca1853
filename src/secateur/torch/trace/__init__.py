"""From a PyTorch model to its Layout: `torch.export`, then union-find over axis atoms, one rule for each operation."""
