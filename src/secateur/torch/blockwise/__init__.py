"""One block of a model at a time: what it is called with, its outputs, its pruning, its reconstruction."""
