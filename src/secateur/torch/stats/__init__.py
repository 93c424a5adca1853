"""Data to Stats: gradients, activations, grams of linear inputs, attention scores."""
