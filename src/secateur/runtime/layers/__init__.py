"""Sparse and fused modules, the kernels as torch operators, and the timing that chooses between them."""
