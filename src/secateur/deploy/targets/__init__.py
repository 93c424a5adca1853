"""One exporter a runtime, and the inputs of an exported program."""
