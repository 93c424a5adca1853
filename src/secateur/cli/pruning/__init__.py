"""What `secateur prune` does in each kind of run, and how results are shown."""
