"""What every other package stands on and what knows nothing of models: errors, names, files, numbers, ONNX text."""
