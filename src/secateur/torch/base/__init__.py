"""What every part of the PyTorch host uses: batches, compute type, expected errors, the manifest of a shrunk model."""
