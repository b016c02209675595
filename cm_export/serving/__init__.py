"""Answers many clients from one loaded bundle: a scheduler over the one decode loop."""
