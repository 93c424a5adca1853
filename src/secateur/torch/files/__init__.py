"""A model as a folder that `from_pretrained` opens, and back."""
