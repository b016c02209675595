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
import onnxruntime as ort

from .core_set import choose, every_neuron
from .errors import InputError

if TYPE_CHECKING:
    from .generate import Engine, Prefilled

EVERY = 16  # tokens of a draft: one dense pass over 16 costs less than two dense steps
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `regenerated` tokens were drafted in vain."""
        return vars(self) | {"regenerated": self.drafted - self.kept}


def check_bundle(recipe: Any) -> None:
    """Raises InputError for a bundle whose prefill throws away what a dense check must read."""
    if recipe.tokens.policy != "dense" and recipe.tokens.cache != "index":
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
    everything = np.arange(request.tokens, dtype=np.int32)[None] if indexed else None
    listed = prefilled.kept_tokens if indexed else None
    dense = prefilled.decoder_of(every_neuron(engine.rows))
    share = prefilled.budget.neuron_share or recipe.neurons.share
    sparse, ladder = None, list(LADDER)
    if prefilled.scores is None or prefilled.neurons == shape.ffn:
        ladder.remove("more neurons")
    if listed is None or listed.shape[1] == request.tokens:
        ladder.remove("tokens back")
    ids: list[int] = []
    logits = prefilled.logits[0]
    while len(ids) < limit:
        draft = [int(logits.argmax())]  # of dense logits: the draft's first token needs no check
        if draft[0] in stop:
            return
        size = min(report.every, limit - len(ids)) if ladder else 1
        started = time.perf_counter()
        while len(draft) < size and draft[-1] not in stop:
            if sparse is None:
                core = choose(prefilled.measured, recipe.neurons, shape, engine.bundle.calibration, share)
                sparse = prefilled.decoder_of(core.constants(engine.rows))
                sparse.cache = dense.cache
            row = sparse.step(request.step_feeds(draft[-1], len(ids) + len(draft) - 1, core_tokens=listed))
            draft.append(int(row[0].argmax()))
        report.draft_s += time.perf_counter() - started
        started = time.perf_counter()
        rows = dense.read(request.step_feeds(draft, len(ids), core_tokens=everything))[0]
        wanted = rows.argmax(-1)
        right = 1
        while right < len(draft) and draft[right] == wanted[right - 1]:
            right += 1
        if right < len(draft):
            dense.cache = _truncated(dense.cache, request.tokens + len(ids) + right)
        logits = rows[right - 1]
        report.check_s += time.perf_counter() - started
        if size > 1:
            report.checks += 1
            report.drafted += len(draft) - 1
            report.kept += right - 1
        else:
            report.dense_steps += 1
        if sparse is not None:
            sparse.cache = dense.cache
        for token in draft[:right]:
            if token in stop:
                return
            ids.append(token)
            yield token
        if ladder and right - 1 < DRIFT * (len(draft) - 1):
            report.drifts += 1
            action = ladder.pop(0)
            report.actions.append(f"{action} after {len(ids)} tokens")
            if action == "more neurons":
                share, sparse = min(1.0, share * _WIDER), None
                if share < 1:
                    ladder.insert(0, "more neurons")
            elif action == "tokens back":
                listed = everything


def _truncated(cache: dict[str, ort.OrtValue], rows: int) -> dict[str, ort.OrtValue]:
    """The first `rows` rows of every key and value; what was read after them is forgotten."""
    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :rows]))
        for name, value in cache.items()
    }
