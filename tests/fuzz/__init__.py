"""Damaged files for every reader: mutators, one table of formats, and a runner whose children may crash."""
