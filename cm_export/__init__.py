"""cm-export: a vision-language checkpoint becomes ONNX graphs and engines that read only core neurons and core tokens."""

__version__ = "0.1.0"
