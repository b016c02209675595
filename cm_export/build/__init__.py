"""From a checkpoint to a bundle: stages, the gates that prove them, and TensorRT engines."""
