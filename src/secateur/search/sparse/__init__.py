"""Zeros in the search, for runtimes that run single zeros fast: densities, their times, and units beside them."""
