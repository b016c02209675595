"""Drafts from what the model usually writes: after the same few tokens, the token that followed them most often.

    there are | three 9 x, two 4 x    "three", right in 9 of 13         three shapes | : 13 x    ":", right nearly always
                                      the longest run of tokens that is known decides, ORDER at most

How often such a token is right is counted in advance, each answer looked up in the others alone, and goes on to be learnt as
drafts are checked; kinds of finds are told apart by how long the run is, how often it was seen and how often the token followed.
A draft from a datastore, as in REST (arXiv 2311.08252), here n-grams of the model's own answers; which gain is expected of it
follows from the chances of its tokens (drafting.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from ..bundle import phrases
from .drafting import Acceptance

# Tokens that a find follows, at most: they reach through the end of a chat template into the question.
ORDER = phrases.LEAD
RUNS = (ORDER, 8, 5, 3, 2, 1)  # how many tokens are looked up, the most first
_LONG, _OFTEN = 3, 4  # a run as long, and a token as frequent as that are the same kind of find as any more
_PARTS = 4  # into which "how often of all" is cut
_UNLIKELY = 0.1  # a draft as seldom right as that goes no further: a row of a check costs more
_DOUBT = Acceptance(0.2, 2.5)  # of a kind of find that was never seen
_TRUST = 32.0  # tokens that what was counted in advance weighs, at most

Run = tuple[int, ...]
Kind = tuple[int, int, int]
Counts = dict[int, int]  # token -> how often it followed a run
Place = tuple[int, list[tuple[int, Counts]]]  # a token, and the runs before it: their lengths, what followed them


@dataclass
class Guess:
    """A draft: tokens, what kind of find each one is, and the chance that it and all before it are right."""

    tokens: list[int] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


class Table:
    """What follows every run of up to ORDER tokens in some answers."""

    def __init__(self, written: phrases.Phrases):
        self._after: dict[Run, Counts] = {}
        self._likeliest: dict[Run, tuple[int, Kind]] = {}  # those that were looked up
        self._rates: dict[Kind, Acceptance] = {}
        texts = [self._places(text, lead) for text, lead in written.texts()]
        _count((place for text in texts for place in text), 1)
        seen: dict[Kind, list[int]] = {}  # [right, of]
        for text in texts:  # as if the others alone were known
            _count(text, -1)
            for token, runs in text:
                if found := next(filter(None, (_likeliest(*run) for run in runs)), None):
                    counts = seen.setdefault(found[1], [0, 0])
                    counts[0] += found[0] == token
                    counts[1] += 1
            _count(text, 1)
        for kind, (right, of) in seen.items():
            rate = (right + _DOUBT.rate * _DOUBT.weight) / (of + _DOUBT.weight)
            self._rates[kind] = Acceptance(rate, min(of + _DOUBT.weight, _TRUST))

    def _places(self, text: list[int], lead: int) -> list[Place]:
        """Of each token of an answer the runs before it, the longest first."""
        return [
            (text[i], [(n, self._after.setdefault(tuple(text[i - n : i]), {})) for n in RUNS if n <= i])
            for i in range(lead, len(text))
        ]

    def _next(self, end: Sequence[int]) -> tuple[int, Kind] | None:
        """What follows the longest run of tokens at the end of a text of which something is known."""
        for length in RUNS:
            run = tuple(end[-length:])
            found = self._likeliest.get(run)
            if found is None and run in self._after and (found := _likeliest(len(run), self._after[run])):
                self._likeliest[run] = found
            if found:
                return found
        return None

    def _rate(self, kind: Kind) -> Acceptance:
        if kind not in self._rates:
            self._rates[kind] = Acceptance(_DOUBT.rate, _DOUBT.weight)
        return self._rates[kind]

    def guess(self, text: Sequence[int], most: int, stop: Set[int]) -> Guess:
        """What may follow a text: at most `most` tokens, up to a stop id, and nothing that is hardly ever right."""
        out, end, chance = Guess(), list(text[-ORDER:]), 1.0
        while len(out.tokens) < most and (found := self._next(end)):
            token, kind = found
            chance *= self._rate(kind).rate
            if chance < _UNLIKELY:
                break
            out.tokens.append(token)
            out.kinds.append(kind)
            out.chances.append(chance)
            if token in stop:
                break
            end = [*end[1 - ORDER :], token]
        return out

    def learn(self, kinds: Sequence[Kind], right: int) -> None:
        """Of drafted tokens of these kinds the first `right` were right; what comes after a wrong one says nothing."""
        for i, kind in enumerate(kinds[: right + 1]):
            self._rate(kind).add(int(i < right), 1)


def _count(places: Iterable[Place], times: int) -> None:
    """Every token once more behind each run before it, or once less."""
    for token, runs in places:
        for _, counts in runs:
            counts[token] = counts.get(token, 0) + times


def _likeliest(length: int, counts: Counts) -> tuple[int, Kind] | None:
    """The token that followed a run of that length most often, and what kind of find that is; None where nothing did."""
    total = sum(counts.values())
    if not total:
        return None
    token = max(counts, key=counts.__getitem__)
    return token, (min(length, _LONG), min(counts[token], _OFTEN), _PARTS * counts[token] // total)
