"""Rewrites of ONNX graphs, one file each; pipeline.py is the order of those of a build."""
