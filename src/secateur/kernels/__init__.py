"""The compiled sparse kernels from Python, on numpy alone: loading, packing, the plain reference, the step table."""
