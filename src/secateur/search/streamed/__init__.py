"""Whole units of a language model larger than memory: statistics, sizes and cuts block by block, resumable."""
