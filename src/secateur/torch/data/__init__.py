"""Text and token windows as batches, example inputs, and runs of a language model over text."""
