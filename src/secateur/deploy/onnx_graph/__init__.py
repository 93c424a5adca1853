"""An ONNX program rewritten to run on the sparse kernels, or with 8-bit weights."""
