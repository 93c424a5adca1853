"""The PyTorch host: layout by tracing, statistics, holding zeros, real removal, saving and loading."""
