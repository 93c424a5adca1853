"""The PyTorch host."""
