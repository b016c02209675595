"""After which layer to cut the image tokens: measured on the model's own answers, one token policy, several shares.

dense answer a_1..a_T; for each prune layer and share: prefill with the cut, the same answer forced -> KL to dense

share .25       layer   1     2     3     4          the earliest within reach of the best: 2
                KL     .31   .12   .11   .40         (earlier cuts save more of the prefill)
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..base.errors import InputError
from ..bundle.calibration import Calibration
from ..evals.other_policies import with_policies
from ..host.decode import teacher_forced
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe, Tokens
from ..recipe.vary import varied

SHARES = (0.25, 0.5)  # of the image tokens
MATTER = ("voters", "layers", "cache", "quota", "first", "first_share")  # keys of [tokens] besides the policy
MOST_LAYERS = 8  # prune layers measured in a deep model: denser among the early ones, whose cuts save more
MOST_PROMPTS = 8
SLACK, LEAST = 0.1, 1e-3  # a layer is as good as the best within a tenth of its KL, or a thousandth of a nat


def candidates(layers: int) -> list[int]:
    """Prune layers to measure: all of 1..layers-1 in a shallow model, eight at growing distances in a deep one."""
    if layers - 1 <= MOST_LAYERS:
        return list(range(1, layers))
    return sorted({round(v) for v in np.geomspace(1, layers - 1, MOST_LAYERS)})


def measure(
    runner: Runner, answers: list, tokens: Tokens, judge: Callable[..., Any], progress: Callable[..., None]
) -> dict[str, np.ndarray]:
    """prune_layers [N], prune_shares [Q] and prune_kl [N,Q]: mean KL to dense in nats per answer token.

    answers: (request, dense answer [T]) pairs, of which those with pictures count; judge(dense logits, logits) -> [T].
    """
    asked = [(r, a) for r, a in answers if r.image_tokens and len(a)][:MOST_PROMPTS]
    layers = candidates(runner.bundle.shape.layers) if asked else []
    kl = np.zeros((len(layers), len(SHARES)))
    expected = [_forced(runner, request, answer, Budget(dense=True)) for request, answer in asked]
    for n, layer in enumerate(layers):
        progress("measure where to cut the image tokens: layer", n + 1, len(layers))
        cut = varied(Recipe(tokens=tokens), tokens__prune_layer=layer, tokens__budget="share", neurons__policy="dense")
        sparse = with_policies(runner, cut)
        for (request, answer), wanted in zip(asked, expected, strict=True):
            for q, share in enumerate(SHARES):
                kl[n, q] += judge(wanted, _forced(sparse, request, answer, Budget(token_share=share))).sum()
    total = max(1, sum(len(w) for w in expected))
    arrays = {"prune_layers": np.array(layers, np.int32), "prune_shares": np.array(SHARES, np.float32)}
    return arrays | {"prune_kl": (kl / total).astype(np.float32)}


def _forced(runner: Runner, request: Any, answer: np.ndarray, budget: Budget) -> np.ndarray:
    """Logits [T,V] before each token of the answer."""
    row = runner.prefill(request, budget).row()
    return teacher_forced(runner.backend, row, answer[:-1].tolist())


def best(calibration: Calibration, share: float) -> int:
    """The earliest measured prune layer that is as good as the best, at the measured share nearest to `share`."""
    column = int(np.abs(calibration.prune_shares - share).argmin())
    kl = calibration.prune_kl[:, column].astype(np.float64)
    return int(calibration.prune_layers[np.flatnonzero(kl <= kl.min() * (1 + SLACK) + LEAST)[0]])


def resolve(recipe: Recipe, calibration: Calibration | None) -> Recipe:
    """The recipe with prune_layer = 0 replaced by the calibration's layer. Raises InputError if it does not know one."""
    if recipe.tokens.policy == "dense" and not recipe.tokens.prune_layer:
        return recipe.replace(tokens__prune_layer=Tokens.prune_layer)  # nothing is cut; other policies may be tried
    if recipe.tokens.prune_layer:
        return recipe
    where, policy = "recipe: tokens.prune_layer = 0", recipe.tokens.policy
    if calibration is None or not len(calibration.prune_layers):
        fix = "calibrate with pictures (`cm-export calibrate --data`), or give a layer"
        raise InputError("the calibration did not measure where to cut", where=where, fix=fix)
    ran = calibration.about.get("ran", {})
    was = ran.get("token_policy")
    if was != policy:
        fix = f"calibrate a bundle built with --tokens {policy}, or give a layer"
        raise InputError(f"the calibration measured the token policy {was!r}, not {policy!r}", where=where, fix=fix)
    for key, measured in ran.get("tokens", {}).items():
        if getattr(recipe.tokens, key) != measured:
            what = f"the calibration measured tokens.{key} = {measured!r}, not {getattr(recipe.tokens, key)!r}"
            raise InputError(what, where=where, fix="calibrate a bundle built with these tokens, or give a layer")
    return recipe.replace(tokens__prune_layer=best(calibration, recipe.tokens.share))
