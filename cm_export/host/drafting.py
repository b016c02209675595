"""What a draft is worth on this machine, by what drafts and checks cost here lately and how many of them were right.

    g tokens of cost c, each right with chance a, then a check of g + 1 tokens of cost v      (costs in dense steps)
    tokens of a round  (1 - a^(g+1)) / (1 - a)           gain over dense decoding = tokens / (g c + v(g+1))

Speculative decoding: arXiv 2211.17192, section 3.1. Tokens that were looked up (repeats.py) cost nothing; sparse ones cost what
was measured, at shares that follow what is right. Where no length gains anything there is no draft but a trial now and then, each
after a pause twice as long as the one before: one bad measurement, or a bad start, ends nothing for good.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, repeat
from operator import mul

_ROW = 0.1  # what each further row costs before that was measured, or less
_AFRESH = 8  # reads after which costs are reckoned again
_MOST = 17  # tokens of a check, mostly
_OLD = 512  # reads after which what a pass took counts no more
_MEMORY = 32  # tokens after which an older observation counts a third
_SEEN, _ENOUGH = 9, 3  # measurements that count; steps before anything is planned
_STALE = 64  # passes over several tokens after which a step alone is measured again
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of weights, at which a policy of thresholds drafts
_TRIAL = 4  # tokens of a trial
_PAUSE, _LONGEST_PAUSE = 24, 1024  # dense steps before sparse drafts are tried again, at first and at most
_AGAIN = 256  # after a pause as long as that even drafts are tried that could not pay by what was measured
_WORTH = 1.05  # gain below which there is no draft: what a pass takes differs by that from one to the next
_LOOKS, _MOST_LOOKS = 4, 128  # the same for what was looked up: how often it is found in vain before it is tried again


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


@dataclass
class Pause:
    """When to try again what does not pay: after `first` times that it did not, then after twice as many, at most `longest`."""

    first: int
    longest: int
    length: int = 0
    left: int = 0

    def over(self) -> bool:
        """It does not pay once more. True where a trial is due: before the first pause, and after each."""
        if self.left:
            self.left -= 1
            return False
        self.length = self.left = min(max(self.first, 2 * self.length), self.longest)
        return True

    def end(self) -> None:
        """It pays, or is worth another trial at once; the next pause is as short as the first."""
        self.length = self.left = 0


def steady(rate: float, most: int) -> Iterator[float]:
    """Chances of the first one, two, ... `most` tokens of a draft, each of which is right with chance `rate`."""
    return accumulate(repeat(rate, most), mul)


def best_length(chances: Iterable[float], cost: float, check: Callable[[int], float]) -> tuple[int, float]:
    """The length with the largest gain, and that gain; below 1 drafts cost more than they give.

    `chances`: that the first one, two, ... tokens of a draft are right; `cost`: of drafting one; `check`: of a pass over so many.
    """
    best, most, tokens = 0, 0.0, 1.0
    for length, chance in enumerate(chances, 1):
        tokens += chance
        gain = tokens / (length * cost + check(length + 1))
        if gain > most:
            best, most = length, gain
    return best, most


@dataclass
class _Lately:
    """The lower quartile of the last measurements: those that were disturbed do not move it."""

    seen: tuple[float, ...] = ()

    def add(self, value: float) -> None:
        self.seen = (*self.seen[1 - _SEEN :], value)

    @property
    def value(self) -> float:
        return sorted(self.seen)[(len(self.seen) - 1) // 4]


@dataclass
class Costs:
    """What reads cost here, in dense steps over one token; kept in seconds, so that one better measurement mends all.

    The first read of a kind (a number of rows; a sparse step) is slow and counts nothing: the runtime plans its memory then.
    """

    _step: _Lately = field(default_factory=_Lately)
    _passes: dict[int, _Lately] = field(default_factory=dict)  # rows -> seconds
    _last: dict[int, int] = field(default_factory=dict)  # rows -> number of the read that was measured last
    _sparse: dict[float, _Lately] = field(default_factory=dict)  # share -> seconds
    _reads: int = 0
    _since: int = 0  # passes over several tokens since the last step alone
    _checks: tuple[float, ...] = ()  # of passes over 0, 1, 2, ... tokens, reckoned now and then
    _met: set[int] = field(default_factory=set)  # numbers of rows that were read before; 0: a sparse step

    @property
    def known(self) -> bool:
        """Whether steps were measured, and not too long ago: what was read since makes them longer."""
        return len(self._step.seen) >= _ENOUGH and self._since < _STALE

    def _is_first(self, kind: int) -> bool:
        is_first = kind not in self._met
        self._met.add(kind)
        return is_first

    def read(self, rows: int, seconds: float) -> None:
        """A dense pass over so many tokens took so long."""
        if not rows or self._is_first(rows):
            return
        self._reads += 1
        if self._reads % _AFRESH == 0 or (rows > 1 and rows not in self._passes) or not self._step.seen:
            self._checks = ()
        if rows == 1:
            self._step.add(seconds)
            self._since = 0
            return
        self._since += 1
        lately = self._passes.get(rows, _Lately())
        lately.add(seconds)
        self._last[rows] = self._reads  # first: other threads look here for what `_passes` has
        self._passes[rows] = lately

    def drafted(self, share: float, seconds: float) -> None:
        """So did a sparse step at this share."""
        if not self._is_first(0):
            self._sparse.setdefault(share, _Lately()).add(seconds)

    def check(self, rows: int) -> float:
        """Of a dense pass over so many tokens: as measured, in a straight line between what was, and beyond it hopefully."""
        checks = self._checks  # of which another thread may make others meanwhile
        if rows >= len(checks):
            points = self._measured()
            last, most = points[-1]
            each = min(_ROW, (most - 1) / (last - 1)) if last > 1 else _ROW
            found = [1.0, 1.0]
            for (begin, low), (end, high) in pairwise(points):
                found += [low + (high - low) * (i - begin) / (end - begin) for i in range(begin + 1, end + 1)]
            found += [most + each * (i - last) for i in range(last + 1, max(rows, _MOST) + 1)]
            self._checks = checks = tuple(found)
        return checks[rows]

    def _measured(self) -> list[tuple[int, float]]:
        """Points of `check`: a pass over fewer tokens never costs more, and what was measured long ago may be wrong by now."""
        points: list[tuple[int, float]] = []
        if self._step.seen:
            for rows in sorted(self._passes, reverse=True):
                if self._reads - self._last[rows] < _OLD:
                    cost = max(1.0, self._passes[rows].value / self._step.value)
                    points.append((rows, min(cost, points[-1][1]) if points else cost))
        return [(1, 1.0), *reversed(points)]

    def sparse(self, share: float, read: Callable[[], float]) -> float:
        """Of a sparse step; as at the nearest share that was measured, else the share of the weights that it would `read`."""
        near = min(self._sparse, key=lambda known: abs(known - share), default=None)
        return read() if near is None or not self._step.seen else self._sparse[near].value / self._step.value

    def is_measured(self, share: float) -> bool:
        """Whether sparse steps at this share were."""
        return share in self._sparse


@dataclass
class Habits:
    """What one loaded bundle has learnt of its drafts, from answer to answer; threads may share it, an error costs time only."""

    costs: Costs = field(default_factory=Costs)
    accepted: Acceptance = field(default_factory=lambda: Acceptance(0.95, 4))  # of sparse tokens
    level: int = SHARES.index(0.5)
    _looked_up: dict[int, tuple[Acceptance, Pause]] = field(default_factory=dict)  # by how many tokens were the same
    _pause: Pause = field(default_factory=lambda: Pause(_PAUSE, _LONGEST_PAUSE))  # of sparse drafts
    _expected: float = 0.0  # gain of the last sparse draft that was thought of

    @property
    def share(self) -> float:
        """At which a policy of thresholds drafts now."""
        return SHARES[self.level]

    def sparse_length(self, most: int, read: Callable[[], float]) -> tuple[int, float]:
        """(sparse tokens of the next draft or 0, gain expected of it). `read`: share of the weights that a sparse step reads."""
        if not self.costs.known or most < 1:
            return 0, 0.0
        if (
            self._pause.left and not self._pause.over()
        ):  # nothing is reckoned in a pause: a step may take half a millisecond
            return 0, self._expected
        cost = self.costs.sparse(self.share, read)
        length, self._expected = best_length(steady(self.accepted.rate, most), cost, self.costs.check)
        if self._expected > _WORTH:
            self._pause.end()
            return length, self._expected
        if not self._pause.over():
            return 0, self._expected
        length, hoped = best_length(steady(1.0, min(most, _TRIAL)), cost, self.costs.check)
        # Not even drafts that are always right would pay: by what was measured, which may be wrong by now.
        return (length if hoped > 1 or self._pause.length > _AGAIN else 0), self._expected

    def learn(self, right: int, drafted: int) -> None:
        """Of `drafted` sparse tokens the first `right` were kept: sparser next time, or two steps denser."""
        self.accepted.add(right, drafted)
        self.level = min(len(SHARES) - 1, self.level + 1) if right == drafted else max(0, self.level - 2)
        if right == drafted and not self.costs.is_measured(self.share):
            self._pause.end()  # sparser may be cheaper

    def found_length(self, same: int, most: int, other: float) -> int:
        """Of a draft that followed `same` tokens before; 0 for none. `other`: gain of the sparse draft that could be made."""
        accepted, pause = self._found(same)
        length, gains = best_length(steady(accepted.rate, most), 0.0, self.costs.check)
        if gains > _WORTH:
            pause.end()
            return length if gains > other else 0
        return min(most, _TRIAL) if pause.over() else 0

    def likely_length(self, chances: Sequence[float]) -> tuple[int, float]:
        """(length of a free draft or 0, its gain); `chances`: that a token of it and all before it are right."""
        length, gain = best_length(chances, 0.0, self.costs.check)
        return (length, gain) if gain > _WORTH else (0, 0.0)

    def learn_found(self, same: int, right: int, drafted: int) -> None:
        """Of `drafted` tokens that were looked up after `same` others the first `right` were kept."""
        accepted, pause = self._found(same)
        accepted.add(right, drafted)
        if right == drafted:
            pause.end()

    def _found(self, same: int) -> tuple[Acceptance, Pause]:
        if same not in self._looked_up:
            self._looked_up[same] = Acceptance(0.5, 4), Pause(_LOOKS, _MOST_LOOKS)
        return self._looked_up[same]
