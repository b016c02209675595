"""A bundle as a model repository of Triton Inference Server: `vlm`, which answers, and graphs that can be called alone."""
