"""A (pruned) decoder as one GGUF file, which llama.cpp and the programs built on it run."""
