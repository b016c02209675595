"""Where tokens may be had for nothing: what followed the same few tokens before in the same text.

    ... at the top left . a blue circle at the | top left .       two to five tokens that stood there before; the longest counts

A table of where every two tokens stood, so that a look takes as long in a long text as in a short one.
Answers to other prompts are not kept for this: who asks next may be somebody else, and would learn from the time that an
answer takes what was said before. Prompt lookup decoding (A. Saxena, 2023), LLMA (arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LONGEST, _SHORTEST = 5, 2  # tokens that must be the same before a continuation is believed
_PLACES = 32  # where the last two tokens stood lately


@dataclass
class Repeats:
    """A text, and for every two of its tokens the places after them."""

    text: list[int] = field(default_factory=list)
    _after: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: Iterable[int]) -> Repeats:
        """The table of a text."""
        out = cls()
        out.extend(text)
        return out

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        text, after = self.text, self._after
        begin = max(len(text), _SHORTEST)
        text.extend(tokens)
        for place, pair in enumerate(zip(text[begin - 2 :], text[begin - 1 : -1], strict=False), begin):
            if pair in after:
                after[pair].append(place)
            else:
                after[pair] = [place]

    def following(self, end: Sequence[int], most: int) -> tuple[int, list[int]]:
        """(n, at most `most` tokens): what followed the last n tokens of `end`, n as large as possible; (0, []) if nothing.

        Of several places the latest counts; only the last ones are looked at, so that a look has its price.
        """
        if len(end) < _SHORTEST:
            return 0, []
        text, longest, found = self.text, 0, 0
        for start in reversed(self._after.get((end[-2], end[-1]), [])[-_PLACES:]):
            same = _SHORTEST
            while same < min(LONGEST, len(end), start) and text[start - same - 1] == end[-same - 1]:
                same += 1
            if same > longest:
                longest, found = same, start
            if longest == LONGEST:
                break
        return longest, text[found : found + most] if longest else []

    def own(self, most: int) -> tuple[int, list[int]]:
        """The same for the end of the text itself."""
        return self.following(self.text[-LONGEST:], most)
