"""What a draft is worth on this machine, by what drafts and checks cost here lately and how many of them were right.

    g tokens of cost c, each right with chance a, then a check of g + 1 tokens of cost v      (costs in dense steps)
    tokens of a round  (1 - a^(g+1)) / (1 - a)           gain over dense decoding = tokens / (g c + v(g+1))

Speculative decoding: arXiv 2211.17192, section 3.1. Tokens that were looked up (repeats.py) cost nothing; sparse ones cost what
was measured, at shares that follow what is right. Where no length gains anything there is no draft, and seldom a trial.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
CHECK = 1.15  # a dense pass over up to 17 tokens, in passes over one, if memory alone decided
_ROW = 0.1  # what each further row costs before that was measured
_MEMORY = 32  # tokens after which an older observation counts a third
_SEEN, _ENOUGH = (
    9,
    3,
)  # measurements that count, of which the first of a process are slow; steps before anything is planned
_STALE = 64  # passes over several tokens after which a step alone is measured again
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of weights, at which a policy of thresholds drafts
_TRIAL, _PAUSE, _LONGEST_PAUSE = 4, 24, 1024  # tokens of a trial; dense steps before the next one, at first and at most


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

    def forget(self) -> None:
        """Nothing was tried: believe what was seen a little less."""
        self.rate += 0.02 * (0.5 - self.rate)


def gain(length: int, rate: float, cost: float, check: float = CHECK) -> float:
    """Tokens a dense step's time with drafts of this length; below 1 they cost more than they give."""
    tokens = length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)
    return tokens / (length * cost + check)


def best_length(
    most: int, rate: float, cost: float, check: Callable[[int], float] = lambda rows: CHECK
) -> tuple[int, float]:
    """The length up to `most` with the largest gain, and that gain; `check`: cost of a pass over so many tokens."""
    lengths = [n for n in (*LENGTHS, most) if 0 < n <= most] or [most]
    return max(((n, gain(n, rate, cost, check(n + 1))) for n in lengths), key=lambda found: found[1])


@dataclass
class _Lately:
    """The lower quartile of the last measurements: those that were disturbed, or came first, do not move it."""

    seen: tuple[float, ...] = ()

    def add(self, value: float) -> None:
        self.seen = (*self.seen[1 - _SEEN :], value)

    @property
    def value(self) -> float:
        return sorted(self.seen)[(len(self.seen) - 1) // 4]


@dataclass
class Costs:
    """What reads cost here, in dense steps over one token; kept in seconds, so that one better measurement mends all."""

    _step: _Lately = field(default_factory=_Lately)
    _passes: dict[int, tuple[int, _Lately]] = field(default_factory=dict)  # bits of a number of rows -> (rows, seconds)
    _sparse: dict[float, _Lately] = field(default_factory=dict)  # share -> seconds
    _since: int = 0  # passes over several tokens since the last step alone
    _each: dict[int, float] = field(default_factory=dict)  # bits of a number of rows -> cost of each row but the first

    @property
    def known(self) -> bool:
        """Whether steps were measured, and not too long ago: what was read since makes them longer."""
        return len(self._step.seen) >= _ENOUGH and self._since < _STALE

    def read(self, rows: int, seconds: float) -> None:
        """A dense pass over so many tokens took so long."""
        self._each = {}
        if rows == 1:
            self._step.add(seconds)
            self._since = 0
        elif rows:
            self._since += 1
            before, lately = self._passes.get(rows.bit_length(), (rows, _Lately()))
            # As if it had been over as many rows as the others of about that number.
            lately.add(seconds * (1 + _ROW * (before - 1)) / (1 + _ROW * (rows - 1)))
            self._passes[rows.bit_length()] = before, lately

    def drafted(self, share: float, seconds: float) -> None:
        """So did a sparse step at this share."""
        self._sparse.setdefault(share, _Lately()).add(seconds)

    def check(self, rows: int) -> float:
        """Of a dense pass over so many tokens; each further row as with the nearest number of rows that was measured."""
        size, known = rows.bit_length(), self._each
        if size not in known:
            near = min(self._passes, key=lambda seen: abs(seen - size), default=None)
            known[size] = _ROW
            if near is not None and self._step.seen:
                measured, lately = self._passes[near]
                known[size] = max(0.0, (lately.value / self._step.value - 1) / (measured - 1))
        return 1 + (rows - 1) * known[size]

    def sparse(self, share: float, read: Callable[[], float]) -> float:
        """Of a sparse step; as at the nearest share that was measured, else the share of the weights that it would `read`."""
        near = min(self._sparse, key=lambda known: abs(known - share), default=None)
        return read() if near is None or not self._step.seen else self._sparse[near].value / self._step.value


@dataclass
class Habits:
    """What one loaded bundle has learnt of its drafts, from answer to answer; threads may share it, an error costs time only."""

    costs: Costs = field(default_factory=Costs)
    accepted: Acceptance = field(default_factory=lambda: Acceptance(0.95, 4))  # of sparse tokens
    level: int = SHARES.index(0.5)
    _looked_up: dict[int, Acceptance] = field(default_factory=dict)  # by how many tokens were the same
    _waited: int = 0
    _pause: int = 0  # dense steps before sparse drafts are tried again

    @property
    def share(self) -> float:
        """At which a policy of thresholds drafts now."""
        return SHARES[self.level]

    def looked_up(self, same: int) -> Acceptance:
        """Of tokens that followed `same` others before."""
        return self._looked_up.setdefault(same, Acceptance(0.5, 4))

    def sparse_length(self, most: int, read: Callable[[], float]) -> tuple[int, float]:
        """(sparse tokens of the next draft or 0, gain expected of it). `read`: share of the weights that a sparse step reads."""
        if not self.costs.known or most < 1:
            return 0, 0.0
        cost = self.costs.sparse(self.share, read)
        length, expected = best_length(most, self.accepted.rate, cost, self.costs.check)
        if expected > 1:
            return length, expected
        self._waited += 1
        if self._waited <= self._pause:
            return 0, expected
        # Not even drafts that are always right would pay: nothing to try.
        self._waited, self._pause = 0, min(max(_PAUSE, 2 * self._pause), _LONGEST_PAUSE)
        length, hoped = best_length(min(most, _TRIAL), 1.0, cost, self.costs.check)
        return (length, expected) if hoped > 1 else (0, expected)

    def learn(self, right: int, drafted: int) -> None:
        """Of `drafted` sparse tokens the first `right` were kept: sparser next time, or two steps denser."""
        self.accepted.add(right, drafted)
        self.level = min(len(SHARES) - 1, self.level + 1) if right == drafted else max(0, self.level - 2)
        if right == drafted:
            self._pause = min(self._pause, _PAUSE)
