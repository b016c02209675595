"""Accuracy and speed beside their controls; tasks/ holds the questions."""
