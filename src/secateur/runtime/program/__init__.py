"""What the graph of a model holds that runs as fewer calls: fusions, chains of layers, decoder steps."""
