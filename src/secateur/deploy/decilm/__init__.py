"""A (pruned) decoder as a Hugging Face folder with `block_configs`, for runtimes that read DeciLM (Nemotron-NAS)."""
