"""From curves and costs to a candidate: the choice, whole layers, trials on true divergence, the local search."""
