"""All prompt tokens are kept: the control that must equal the dense model; there is nothing to score."""

WIRES = ()
ATTRIBUTES = ()
SCORES = False
FUNCTION = None


def score() -> None:
    """No scores: nothing is cut."""
    return None
