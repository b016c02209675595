"""The guard: sparse decode drafts, one dense pass over the draft decides, so that the answer is the dense model's own.

    draft   t0 . t1 . t2 . t3      R tokens, sparse: chosen neurons, listed cache rows
    check   t0   t1   t2   t3      one dense pass reads them all: every weight once for R tokens
    keep    t0   t1                up to the first token that the dense model would have chosen otherwise
    next              t2'          its own choice goes on; keys and values of all kept tokens are the dense pass's

Where the last tokens stood before, in the prompt or the answer, what followed them there is the draft, and
costs nothing (repeats.py); so does what the model usually writes after them (phrases.py). A policy of thresholds drafts at a
share that shrinks while drafts are right and grows when they are not, and not at all where that would not pay: what steps and
checks take is measured as they run (drafting.py). With other policies a draft that fails often is answered in steps (`LADDER`):
more neurons, the dropped tokens back, dense.

Speculative decoding (arXiv 2211.17192) with the model's own sparse form as the draft, as in Draft&Verify (arXiv 2309.08168).
Draft and check choose by the same rule, penalty included; drawn tokens are drawn in the same race (sampling.drawn), so the
answer is the one that the dense model alone draws with that seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..base.errors import InputError
from ..recipe.recipe import Recipe
from .core_set import CoreSet
from .decode import Reader, Row
from .drafting import Habits
from .phrases import Guess
from .repeats import Repeats
from .runner import Prefilled, Runner
from .sampling import Chooser
from .writing import Writing

EVERY = 16  # tokens of a draft: up to 16 rows a dense pass costs what one row costs, then it grows with them
SHORTEST = 4  # a draft after several that failed
DRIFT = 0.5  # a draft of which less than this share is kept is a drift
LADDER = ("more neurons", "tokens back", "dense")
_WIDER = 1.5  # times the neurons


@dataclass
class Report:
    """What the guard did for one answer, and what it cost."""

    every: int
    checks: int = 0
    drafted: int = 0
    kept: int = 0
    drifts: int = 0
    actions: list[str] = field(default_factory=list)
    dense_steps: int = 0
    draft_s: float = 0.0
    check_s: float = 0.0
    free: int = 0  # tokens that a check's own logits gave, besides the prefill's
    looked_up: int = 0  # drafted tokens that followed the same words before
    looked_up_kept: int = 0
    phrases: int = 0  # drafted tokens that the model usually writes there
    phrases_kept: int = 0
    share: float | None = None  # at which a policy of thresholds drafted last
    gain: float | None = None  # over dense decoding, expected from acceptance and share; nothing is drafted below 1.05

    def __post_init__(self) -> None:
        """Raises InputError for drafts without a token."""
        if self.every < 1:
            raise InputError(f"drafts of {self.every} tokens", where="guard", fix="give 1 or more")

    def add(self, drafted: int, kept: int, read: int, is_first: bool) -> None:
        """One check: of `drafted` tokens `kept` were right; `read` tokens went through the dense model."""
        self.free += not is_first
        if drafted:
            self.checks += 1
            self.drafted += drafted
            self.kept += kept
        elif read:
            self.dense_steps += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `regenerated` tokens were drafted in vain.

        `sparse_s`: what the same answer takes without checks, at the speed of the drafts; `overhead`: how much more was
        spent. An estimate: rows are gathered once and counted as if that grew with the drafts.
        """
        sparse = self.draft_s * (self.kept + self.free) / self.drafted if self.drafted else None
        overhead = (self.draft_s + self.check_s) / sparse - 1 if sparse else None
        return vars(self) | {"regenerated": self.drafted - self.kept, "sparse_s": sparse, "overhead": overhead}


def check_bundle(recipe: Recipe) -> None:
    """Raises InputError for a bundle whose prefill throws away what a dense check must read."""
    if not recipe.tokens.whole_cache:
        raise InputError(
            "this bundle drops the cache of cut tokens, so nothing can be checked against the whole",
            where="--guard",
            fix="build it with --token-cache index (or --tokens dense)",
        )


class _Draft:
    """The sparse form of the model, and how much of it there is: the answer to drafts that fail often widens it."""

    def __init__(self, runner: Runner, prefilled: Prefilled):
        self._prefilled: Prefilled = prefilled
        self._habits: Habits = runner.habits
        self._share = prefilled.budget.neuron_share or runner.recipe.neurons.share
        self._cores: dict[float, CoreSet] = {self._share: prefilled.core_set}
        self._listed = prefilled.kept_tokens[0] if runner.recipe.tokens.policy != "dense" else None
        self.ladder = list(LADDER)
        if prefilled.core_set.is_whole:
            self.ladder.remove("more neurons")
        self.adapts = prefilled.core_set.thresholds is not None
        if self.adapts:
            self._share = self._habits.share
            self.ladder.remove("dense")  # where drafts do not pay, there are none
            if "more neurons" in self.ladder:
                self.ladder.remove("more neurons")
        if self._listed is None or len(self._listed) == prefilled.request.tokens:
            self.ladder.remove("tokens back")

    def wanted(self, size: int, report: Report) -> int:
        """Tokens of the next draft, its first one, which is the dense model's, included."""
        if not self.adapts:
            return size if self.ladder else 1
        self._share = report.share = self._habits.share
        length, report.gain = self._habits.sparse_length(size, lambda: self._core_now().read)
        return length + 1

    def took(self, seconds: list[float]) -> None:
        """What the sparse steps of a draft have taken, one by one."""
        for second in seconds:
            self._habits.costs.drafted(self._share, second)

    def learn(self, right: int, drafted: int) -> None:
        """Of `drafted` sparse tokens the first `right` were kept."""
        if self.adapts and drafted:
            self._habits.learn(right, drafted)

    def _core_now(self) -> CoreSet:
        if self._share not in self._cores:
            self._cores[self._share] = self._prefilled.core_of(self._share)
        return self._cores[self._share]

    def row(self) -> Row:
        """The request as it is drafted now."""
        return self._prefilled.row(self._core_now(), graph="decode", listed=self._listed)

    def widen(self) -> str:
        """Take the next step of the ladder, and say which."""
        action = self.ladder.pop(0)
        if action == "more neurons":
            self._share = min(1.0, self._share * _WIDER)
            if self._share < 1:
                self.ladder.insert(0, action)
        elif action == "tokens back":
            self._listed = np.arange(self._prefilled.request.tokens, dtype=np.int32)
        return action


def guarded(
    runner: Runner,
    prefilled: Prefilled,
    limit: int,
    choose: Chooser,
    report: Report,
    writing: Writing | None = None,
) -> Iterator[int]:
    """Token ids of the dense model's own answer; a draft at a time.

    Until a stop id (not yielded), `limit`, or a stop string of `writing`, which gets every token before it is yielded.
    """
    stop = choose.stop
    reader, draft, size = Reader(runner.backend), _Draft(runner, prefilled), report.every
    dense = prefilled.row(graph="decode_dense", few_rows=True, kept=None, listed=None)
    runner.backend.ready("decode")  # both made before anything is timed
    runner.backend.ready("decode_dense", few_rows=True)
    ids: list[int] = []
    text = Repeats.of(prefilled.request.ids.tolist())
    while len(ids) < limit:
        started = time.perf_counter()
        first = choose.after(dense.last, ids)
        text.extend([first])
        room = limit - len(ids)
        wanted = min(draft.wanted(size, report), room)
        known = None
        if room > 1 and first not in stop and (runner.habits.costs.known or not draft.adapts):
            known = _known(text, min(report.every, room - 1), report.gain or 0.0, stop, runner)
        drafted = [first, *known.tokens] if known else [first]
        if not known and wanted > 1:
            drafted, took = _drafted(reader, draft.row(), dense, first, wanted, choose, ids)
            draft.took(took)
        if drafted[0] in stop:  # chosen from dense logits: it needs no check
            report.free += bool(ids)
            return
        checked_at = time.perf_counter()
        report.draft_s += checked_at - started
        # Nobody reads on after the last token of an answer.
        ends = drafted[-1] in stop or len(ids) + len(drafted) == limit
        read = drafted[:-1] if ends else drafted
        right = _checked(reader, dense, drafted, read, choose, ids)
        check_s = time.perf_counter() - checked_at
        report.check_s += check_s
        runner.habits.costs.read(len(read), check_s)
        report.add(drafted=len(drafted) - 1, kept=right - 1, read=len(read), is_first=not ids)
        text.extend(drafted[1:right])
        if known:  # before anything is handed out: whoever asked may want no more, and a stop id ends the answer
            known.learn(right - 1)
            if known.usual:
                report.phrases += len(known.tokens)
                report.phrases_kept += right - 1
            else:
                report.looked_up += len(known.tokens)
                report.looked_up_kept += right - 1
        else:
            draft.learn(right - 1, len(drafted) - 1)
        for token in drafted[:right]:
            if token in stop:
                return
            ids.append(token)
            if writing:
                writing.add(token)
            yield token
            if writing and writing.stopped is not None:
                return
        if known:
            continue
        whole = right == len(drafted)
        size = min(report.every, 2 * size) if whole else max(min(SHORTEST, report.every), size // 2)
        if draft.ladder and right - 1 < DRIFT * (len(drafted) - 1):
            report.drifts += 1
            report.actions.append(f"{draft.widen()} after {len(ids)} tokens")


@dataclass(frozen=True)
class _Known:
    """A draft that cost nothing, whether it is `usual` or stood before, and who is told how many of its tokens were right."""

    tokens: list[int]
    usual: bool
    learn: Callable[[int], None]


def _known(text: Repeats, most: int, other: float, stop: frozenset[int], runner: Runner) -> _Known | None:
    """What stood before after the end of the text or what usually follows it, up to a stop id, whichever gains more, and as
    long as pays best; None where another draft gains more."""
    habits, table = runner.habits, runner.phrases
    guess = table.guess(text.text, most, stop) if table else Guess()
    length, gain = habits.likely_length(guess.chances)
    same, found = text.own(most)
    if found:
        end = next((i + 1 for i, token in enumerate(found) if token in stop), len(found))
        own = habits.found_length(same, end, max(other, gain))
        if own:
            return _Known(found[:own], False, lambda right: habits.learn_found(same, right, own))
    if not length or table is None or gain <= other:
        return None
    return _Known(guess.tokens[:length], True, partial(table.learn, guess.kinds[:length]))


def _drafted(
    reader: Reader, sparse: Row, dense: Row, first: int, wanted: int, choose: Chooser, ids: list[int]
) -> tuple[list[int], list[float]]:
    """Up to `wanted` tokens after `ids`, and seconds of each sparse step.

    `first` is as the dense model has it, the others are sparse; a stop id ends them.
    """
    sparse.follow(dense)
    out, took = [first], []
    while len(out) < wanted and out[-1] not in choose.stop:
        started = time.perf_counter()
        reader.read([sparse], [out[-1:]])
        out.append(choose.after(sparse.last, ids + out))
        took.append(time.perf_counter() - started)
    return out, took


def _checked(reader: Reader, dense: Row, drafted: list[int], read: list[int], choose: Chooser, ids: list[int]) -> int:
    """How many tokens drafted after `ids` the dense model chooses, too; it has read those of them that are in `read`."""
    right, before = 1, dense.read
    if read:
        reader.read([dense], [read])
        logits = np.atleast_2d(dense.logits)
        while right < len(drafted) and drafted[right] == choose.after(logits[right - 1], ids + drafted[:right]):
            right += 1
        if right < len(read):
            dense.back_to(before + right)
        dense.logits = logits[min(right, len(read)) - 1]
    return right
