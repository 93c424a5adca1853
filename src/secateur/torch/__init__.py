"""The PyTorch side of secateur: everything here may import torch and transformers."""
