"""Rewrites of ONNX graphs, one file each; pipeline.py is their order."""
