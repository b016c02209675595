"""Where tokens may be had for nothing: what followed the same few tokens before, in a text or in earlier answers.

    ... at the top left . a blue circle at the | top left .       two to five tokens that stood there before; the longest counts

A table of all such places, one entry a token and length, so that a look takes as long in a long text as in a short one.
Prompt lookup decoding (A. Saxena, 2023), LLMA (arXiv 2304.04487); earlier answers as in REST (arXiv 2311.08252).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LONGEST, _SHORTEST = 5, 2  # tokens that must be the same before a continuation is believed
_END = -1  # what stands between two answers; no token
_MOST = 8192  # tokens after which earlier answers are put aside, and those put aside before are forgotten


@dataclass
class Repeats:
    """A text, and for every two to five of its tokens where they stood last with something after them."""

    text: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)

    @classmethod
    def of(cls, text: Iterable[int]) -> Repeats:
        """The table of a text."""
        out = cls()
        out.extend(text)
        return out

    def extend(self, tokens: Iterable[int]) -> None:
        """The text goes on."""
        for token in tokens:
            self.text.append(token)
            start = len(self.text) - 1
            for length in range(_SHORTEST, min(LONGEST, start) + 1):
                self._after[tuple(self.text[start - length : start])] = start

    def following(self, end: Sequence[int], most: int) -> tuple[int, list[int]]:
        """(n, at most `most` tokens): what followed the last n tokens of `end`, n as large as possible; (0, []) if nothing."""
        for length in range(min(LONGEST, len(end)), _SHORTEST - 1, -1):
            start = self._after.get(tuple(end[-length:]))
            if start is not None:
                return length, self.text[start : start + most]
        return 0, []

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
