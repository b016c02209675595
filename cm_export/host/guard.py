"""The guard: sparse decode drafts, one dense pass over the draft decides, so that the answer is the dense model's own.

    draft   t0 . t1 . t2 . t3      R tokens, sparse: chosen neurons, listed cache rows
    check   t0   t1   t2   t3      one dense pass reads them all: every weight once for R tokens
    keep    t0   t1                up to the first token that the dense model would have chosen otherwise
    next              t2'          its own choice goes on; keys and values of all kept tokens are the dense pass's

A draft that fails often is answered in steps (`LADDER`): more neurons, the dropped tokens back, dense. Speculative
decoding (arXiv 2211.17192) with the model's own sparse form as the draft, as in Draft&Verify (arXiv 2309.08168).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.errors import InputError
from .core_set import choose

if TYPE_CHECKING:
    from .runner import Engine, Prefilled

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `regenerated` tokens were drafted in vain.

        `sparse_s`: what the same answer takes without checks, at the speed of the drafts; `overhead`: how much more was
        spent. An estimate: rows are gathered once and counted as if that grew with the drafts.
        """
        sparse = self.draft_s * (self.kept + self.free) / self.drafted if self.drafted else None
        overhead = (self.draft_s + self.check_s) / sparse - 1 if sparse else None
        return vars(self) | {"regenerated": self.drafted - self.kept, "sparse_s": sparse, "overhead": overhead}


def check_bundle(recipe: Any) -> None:
    """Raises InputError for a bundle whose prefill throws away what a dense check must read."""
    if not recipe.tokens.whole_cache:
        raise InputError(
            "this bundle drops the cache of cut tokens, so nothing can be checked against the whole",
            where="--guard",
            fix="build it with --token-cache index (or --tokens dense)",
        )


def guarded(
    engine: "Engine", prefilled: "Prefilled", limit: int, stop: frozenset[int], report: Report
) -> Iterator[int]:
    """Token ids of the dense model's greedy answer, until a stop id (not yielded) or `limit`; a draft at a time."""
    request, shape, recipe = prefilled.request, engine.bundle.shape, engine.recipe
    indexed = recipe.tokens.policy != "dense"
    listed = prefilled.kept_tokens if indexed else None
    dense = prefilled.checker()
    engine.backend.ready("decode")  # made before anything is timed
    share = prefilled.budget.neuron_share or recipe.neurons.share
    sparse, ladder, size = None, list(LADDER), report.every
    if prefilled.neurons == shape.ffn:
        ladder.remove("more neurons")
    if listed is None or listed.shape[1] == request.tokens:
        ladder.remove("tokens back")
    ids: list[int] = []
    logits = prefilled.logits[0]
    while len(ids) < limit:
        draft = [int(logits.argmax())]  # of dense logits: the draft's first token needs no check
        if draft[0] in stop:
            report.free += bool(ids)
            return
        wanted = min(size if ladder else 1, limit - len(ids))
        started = time.perf_counter()
        while len(draft) < wanted and draft[-1] not in stop:
            if sparse is None:
                core = choose(prefilled.measured, recipe.neurons, shape, engine.bundle.calibration, share)
                sparse = prefilled.decoder_of(core.constants(engine.backend.rows))
                sparse.cache = dense.cache
            row = sparse.step(request.step_feeds(draft[-1], len(ids) + len(draft) - 1, core_tokens=listed))
            draft.append(int(row[0].argmax()))
        checked_at = time.perf_counter()
        report.draft_s += checked_at - started
        # Nobody reads on after the last token of an answer.
        ends = draft[-1] in stop or len(ids) + len(draft) == limit
        right, read = 1, draft[:-1] if ends else draft
        if read:
            rows = dense.read(request.step_feeds(read, len(ids)))[0]
            chosen = rows.argmax(-1)
            while right < len(draft) and draft[right] == chosen[right - 1]:
                right += 1
            if right < len(read):
                dense.truncate(request.tokens + len(ids) + right)
            logits = rows[min(right, len(read)) - 1]
        report.check_s += time.perf_counter() - checked_at
        report.free += bool(ids)
        if len(draft) > 1:
            report.checks += 1
            report.drafted += len(draft) - 1
            report.kept += right - 1
        elif read:
            report.dense_steps += 1
        if sparse is not None:
            sparse.cache = dense.cache
        for token in draft[:right]:
            if token in stop:
                return
            ids.append(token)
            yield token
        size = min(report.every, 2 * size) if right == len(draft) else max(min(SHORTEST, report.every), size // 2)
        if ladder and right - 1 < DRIFT * (len(draft) - 1):
            report.drifts += 1
            action = ladder.pop(0)
            report.actions.append(f"{action} after {len(ids)} tokens")
            if action == "more neurons":
                share, sparse = min(1.0, share * _WIDER), None
                if share < 1:
                    ladder.insert(0, "more neurons")
            elif action == "tokens back":
                listed = np.arange(request.tokens, dtype=np.int32)[None]
