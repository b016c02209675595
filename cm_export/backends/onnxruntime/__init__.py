"""ONNX Runtime: the graphs of a bundle on a CPU."""

from .backend import open

__all__ = ["open"]
