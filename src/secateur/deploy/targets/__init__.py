"""One exporter a runtime, and the inputs of exported programs."""
