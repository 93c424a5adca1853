"""Save a model as a folder that `from_pretrained` opens, and load it."""
