"""All neurons are core neurons: the control that must equal the dense model; there is nothing to score."""

WIRES = ()
ATTRIBUTES = ()
SCORES = False
FUNCTION = None


def score() -> None:
    """No scores: the decode graph of a dense bundle takes no core neurons."""
    return None
