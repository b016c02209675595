"""What a draft is worth: how long it should be, how sparse, and where tokens may be had for nothing.

    g drafts of cost c, each right with chance a, then a check of cost v      (costs in dense steps)
    tokens of a round  (1 - a^(g+1)) / (1 - a)           gain over dense decoding = tokens / (g c + v)

    ... at the top left . a blue circle at the | top left .     <- looked up: what followed the same words before

Speculative decoding: arXiv 2211.17192, section 3.1. Drafts from the text's own repetitions: prompt lookup decoding (A. Saxena,
2023), LLMA (arXiv 2304.04487).
"""

from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = (2, 4, 8, 16)
CHECK = 1.15  # a dense pass over up to 17 tokens, in passes over one (docs/speed.md)
LEAST_LOOKED_UP = 0.35  # acceptance of looked-up tokens below which a check of them costs more than it gives
_LONGEST, _SHORTEST = 5, 2  # tokens that must be the same before a continuation is believed
_MEMORY = 32  # tokens after which an older observation counts a third


@dataclass
class Acceptance:
    """How often a drafted token was right, lately: a mean that forgets. Begins as a guess that weighs as 8 tokens."""

    rate: float
    weight: float = 8.0

    def add(self, right: int, drafted: int) -> None:
        """Of `drafted` tokens the first `right` were right; what comes after a wrong one says nothing."""
        seen = min(right + 1, drafted)
        if not seen:
            return
        old = self.weight * (1 - 1 / _MEMORY) ** seen
        self.rate = (self.rate * old + right) / (old + seen)
        self.weight = old + seen


def gain(length: int, rate: float, cost: float) -> float:
    """Tokens a dense step's time with drafts of this length; below 1 they cost more than they give."""
    tokens = length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)
    return tokens / (length * cost + CHECK)


def best_length(most: int, rate: float, cost: float) -> tuple[int, float]:
    """The length up to `most` with the largest gain, and that gain."""
    lengths = [n for n in (*LENGTHS, most) if 0 < n <= most] or [most]
    return max(((n, gain(n, rate, cost)) for n in lengths), key=lambda found: found[1])


def looked_up(text: Sequence[int], most: int) -> list[int]:
    """What followed the last tokens of `text` where they stood before, at most `most` tokens; empty where they did not.

    Of several places the latest counts, and a longer repetition before a shorter one.
    """
    for length in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
        end = list(text[-length:])
        for start in range(len(text) - length - 1, -1, -1):
            if list(text[start : start + length]) == end:
                return list(text[start + length : start + length + most])
    return []
