"""What is measured once per checkpoint, on text that the model writes itself."""
