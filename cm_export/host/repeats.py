"""Where tokens may be had for nothing: what followed the same few tokens before, in a text or in earlier answers.

    ... at the top left . a blue circle at the | top left .       two to five tokens that stood there before; the longest counts

A table of where every two tokens stood, so that a look takes as long in a long text as in a short one.
Prompt lookup decoding (A. Saxena, 2023), LLMA (arXiv 2304.04487); earlier answers as in REST (arXiv 2311.08252).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LONGEST, _SHORTEST = 5, 2  # tokens that must be the same before a continuation is believed
_PLACES = 32  # where the last two tokens stood lately
_END = -1  # what stands between two answers; no token
_MOST = 8192  # tokens after which earlier answers are put aside, and those put aside before are forgotten


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
        for token in tokens:
            if len(text) >= _SHORTEST:
                after.setdefault((text[-2], text[-1]), []).append(len(text))
            text.append(token)

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


class EarlierAnswers:
    """The last answers that one loaded bundle gave, for all of its threads."""

    def __init__(self) -> None:
        self._now, self._before = Repeats(), Repeats()
        self._changing = threading.Lock()

    def add(self, beginning: Sequence[int], answer: Sequence[int]) -> None:
        """An answer that ended; `beginning`: the last tokens before it."""
        with self._changing:
            if len(self._now.text) > _MOST:
                self._before, self._now = self._now, Repeats()
            self._now.extend([*beginning[-_SHORTEST:], *answer, _END])

    def following(self, end: Sequence[int], most: int) -> tuple[int, list[int]]:
        """As of Repeats; up to the end of the answer that is found."""
        found = max((r.following(end, most) for r in (self._now, self._before)), key=lambda f: f[0])
        return found[0], found[1][: found[1].index(_END)] if _END in found[1] else found[1]
