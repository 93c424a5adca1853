"""Builds the parts of a record (`secateur.schemas.record`) from what was measured; no framework is needed."""
