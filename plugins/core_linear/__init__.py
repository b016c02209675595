"""The op CoreLinear."""
