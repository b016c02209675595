"""TensorRT: the engines of a bundle, from lowering a graph for a version to running its plan."""

from .backend import open

__all__ = ["open"]
