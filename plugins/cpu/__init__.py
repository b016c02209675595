"""The CPU ops of cm_export for ONNX Runtime: products that read only the listed rows of low-bit weights."""
