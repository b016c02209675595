"""What each layer of the dense model does: where its attention goes, how few neurons matter, how alike core sets are.

dense prefill, rewritten in memory to report q, k, z  ->  per layer and question
    image      share of the asking tokens' attention that goes to image tokens
    top_tokens share of that which the top quarter of the image tokens receives
    own        share of ||z||^2 in the 20 % strongest neurons of each token, mean over tokens
    fixed      the same for the one set of 20 % that is best for the whole question, the most that a set per request can hold
    overlap    Jaccard of the core sets of two questions, as the chosen policy names them
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from ..evals.watching import watching
from ..families import Family, Shape
from ..host.request import Request, prefill_feeds
from ..host.runner import Budget, Runner
from ..surgery.report_activations import report_activations
from ..surgery.report_attention import report_attention

TOKENS, NEURONS = 0.25, 0.2  # the shares that "top" means


@dataclass(frozen=True)
class Layers:
    """Shares [L, questions] (overlap: [L, pairs of questions]); None where there is nothing to compare."""

    questions: int
    image: np.ndarray | None
    top_tokens: np.ndarray | None
    own: np.ndarray
    fixed: np.ndarray
    overlap: np.ndarray | None
    by_chance: np.ndarray | None  # [L]: Jaccard of two random sets of that size


def measure(
    runner: Runner, chosen: Runner, requests: Sequence[Request], progress: Callable[..., None] = lambda *_: None
) -> Layers:
    """`runner`: the bundle; `chosen`: the same under the policies whose core sets are compared. Raises SurgeryError."""
    watch = watching(runner, "prefill", "prefill_dense", _report)
    found: dict[str, list[list[float]]] = {"image": [], "top_tokens": [], "own": [], "fixed": []}
    sets = []
    for number, request in enumerate(requests):
        progress("watch the layers", number, len(requests))
        outputs, _ = watch.backend.prefill(prefill_feeds(request))
        layers = range(runner.bundle.shape.layers)
        looks = [attention(outputs[f"q.{i}"][0], outputs[f"k.{i}"][0], request) for i in layers]
        spent = [activation(outputs[f"z.{i}"][0]) for i in layers]
        if request.image_tokens:
            found["image"].append([a for a, _ in looks])
            found["top_tokens"].append([b for _, b in looks])
        found["own"].append([a for a, _ in spent])
        found["fixed"].append([b for _, b in spent])
        del outputs
        core = chosen.prefill(request, Budget()).core_set
        sets.append((core.neurons, core.counts))
    watch.backend.drop("prefill")
    image, top_tokens = (np.array(found[k]).T if found[k] else None for k in ("image", "top_tokens"))
    overlap, chance = _overlap(sets, runner.bundle.shape.ffn)
    own, fixed = np.array(found["own"]).T, np.array(found["fixed"]).T
    return Layers(len(requests), image, top_tokens, own, fixed, overlap, chance)


def attention(q: np.ndarray, k: np.ndarray, request: Request) -> tuple[float, float]:
    """(to image tokens, of that to their top quarter) from q [H,S,d], k [Hk,S,d]; asking tokens are those after the picture."""
    image = np.flatnonzero(request.is_image[0])
    if not image.size:
        return math.nan, math.nan
    asking = np.arange(min(image[-1] + 1, q.shape[1] - 1), q.shape[1])
    k = np.repeat(k.astype(np.float64), len(q) // len(k), axis=0)
    logits = q[:, asking].astype(np.float64) @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    logits[:, np.arange(q.shape[1])[None] > asking[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    received = (weights / weights.sum(-1, keepdims=True)).mean((0, 1))[image]
    return float(received.sum()), _top(received, TOKENS)


def activation(z: np.ndarray) -> tuple[float, float]:
    """(own, fixed) shares of the energy of z [S,F] in the top fifth of the neurons."""
    energy = np.square(z.astype(np.float64))
    energy /= np.maximum(energy.sum(1, keepdims=True), 1e-60)  # every token counts the same, as in GRIFFIN
    count = _count(z.shape[1], NEURONS)
    own = np.partition(energy, z.shape[1] - count, axis=1)[:, -count:].sum(1).mean()
    return float(own), _top(energy.mean(0), NEURONS)


def _top(mass: np.ndarray, share: float) -> float:
    """The part of the mass in its largest entries."""
    return float(np.sort(mass)[-_count(len(mass), share) :].sum() / max(mass.sum(), 1e-60))


def _count(n: int, share: float) -> int:
    return max(1, math.floor(share * n + 0.5))


def _overlap(sets: list[tuple[np.ndarray | None, np.ndarray]], ffn: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Jaccard [L,pairs] of core sets [L,1,K] (the first counts[l] count), and what chance gives [L]."""
    counts = sets[0][1] if sets else np.array([])
    fixed = [(ids, own) for ids, own in sets if ids is not None]
    if len(sets) < 2 or len(fixed) < len(sets) or (counts == ffn).all():
        return None, None  # one question, sets that change with every token, or no choice at all
    masks = np.zeros((len(sets), len(counts), ffn), bool)
    for mask, (ids, own) in zip(masks, fixed, strict=True):
        for layer, count in enumerate(own.tolist()):
            mask[layer, ids[layer, 0, :count]] = True
    pairs = [(a & b).sum(1) / (a | b).sum(1) for a, b in itertools.combinations(masks, 2)]
    p = counts / ffn
    return np.array(pairs).T, p / (2 - p)


def _report(model: onnx.ModelProto, family: Family, shape: Shape) -> onnx.ModelProto:
    """q and k, then z of every layer: the sites of the first two are found in the traced form."""
    return report_activations(report_attention(model, family, shape), family, shape)
