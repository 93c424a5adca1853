"""What tasks share: the base class, encoded rows and their batches, labels of a head, the evaluation."""
