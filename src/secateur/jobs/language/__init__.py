"""How good a language model still is: beside the dense model, beside fewer bits, beside its speed, and on tasks."""
