"""Proofs that nothing broke, run by every build on CPU: traced equals PyTorch, full budget equals dense; and the drift.

gate              compares                                               fails the build
vision            vision graph with transformers' tower                  yes, of a model that has one
prefill           dense prefill: logits and cache                        yes
decode            8 dense greedy steps: logits and token ids             yes
full budget       sparse graphs with all tokens and all neurons, dense   yes
predictor         copies by which decode chooses, with the weights       yes
turn              those 8 tokens read at once over the prefill's cache   yes, where the bundle has that graph
drift             sparse graphs at the recipe's budget, dense            no: it is what the budget costs
"""

from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..backends.onnxruntime.backend import (  # proofs of the portable graphs, whatever the bundle runs on
    Backend,
    CoreRows,
)
from ..base.errors import GateFailed
from ..base.metrics import divergences
from ..bundle.calibration import Calibration
from ..bundle.names import core_row_names
from ..bundle.predictor import copy_error
from ..host.core_set import choose, every_neuron
from ..host.request import Request, prefill_feeds, sparse_feeds
from ..recipe.recipe import Recipe

# Largest difference allowed, relative to max(1, largest reference value). float32 differs from PyTorch by 1e-6 where
# sums are short; sums over 10^4 terms in 28 layers bring it to some 1e-5, and a wrong mask or position to above 1e-2.
LIMIT = 1e-4
# Of a 4-bit copy, relative: .1 for weights like a Gaussian, up to .3 where a few are very large; in a wrong order 1.4.
COPY_LIMIT = 0.5


@dataclass(frozen=True)
class Gate:
    """One proof: the measured difference, its limit (None: only reported) and what was compared."""

    name: str
    value: float
    limit: float | None
    passed: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared(
    name: str,
    where: str,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    limit: float | None,
    detail: str,
    fix: str,
) -> Gate:
    """The gate of outputs and what they must equal, by name. Raises GateFailed naming the one that differs most.

    Differences are relative to max(1, largest reference value). limit None: only reported, unless it is no number.
    """
    worst, value = "", -1.0
    for output, (ours, theirs) in pairs.items():
        if ours.shape != theirs.shape:
            raise GateFailed(f"shape {ours.shape}, expected {theirs.shape}", where=f"{where}: {output}")
        difference = float(np.abs(ours.astype(np.float64) - theirs).max() / max(1.0, np.abs(theirs).max()))
        if not difference <= value:  # also takes nan
            worst, value = output, difference
    most = np.inf if limit is None else limit
    if not value <= most:
        what = f"differs by {value:.1e} (limit {most:.0e})"
        raise GateFailed(what, where=f"gate {name!r}, {where}: {worst}", fix=fix)
    return Gate(name, value, limit, True, detail)


def run_gates(
    backend: Backend,
    family: ModuleType,
    shape: Any,
    recipe: Recipe,
    probe: dict,
    reference: dict,
    calibration: Calibration | None = None,
) -> list[Gate]:
    """All gates in order. Raises GateFailed at the first that does not hold, naming the graph and the output.

    One large session lives at a time, so that memory stays at one mapping of the weights.
    """
    gates: list[Gate] = []

    def gate(name: str, graph: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], detail: str) -> None:
        fix = "no bundle was written; please report this checkpoint's config.json"
        gates.append(compared(name, f"{graph}.onnx", pairs, LIMIT, detail, fix))

    embeds = None
    if shape.sees:
        embeds = backend.vision(family.vision_inputs(probe["pixel_values"], probe["grid"], shape.merge))
        gate("vision", "vision", {"image_embeds": (embeds, reference["image_embeds"])}, "PyTorch")
        backend.drop("vision")

    request = Request.of(probe["input_ids"], probe["grid"], family, shape, backend.weights, embeds)
    gate(
        "positions",
        "host",
        {"position_ids": (request.position_ids[:, 0], reference["position_ids"])},
        "what PyTorch's rotary embedding got",
    )
    feeds = prefill_feeds(request)
    dense = backend.host(backend.prefill(feeds, "prefill_dense"))
    backend.drop("prefill_dense")
    pairs = {"logits": (dense["logits"][0], reference["logits"])}
    for i in range(shape.layers):
        for part in ("key", "value"):
            pairs[f"present.{i}.{part}"] = (dense[f"present.{i}.{part}"][0], reference[f"cache.{i}.{part}"])
    gate("prefill", "prefill_dense", pairs, "PyTorch: logits, keys, values")

    cache, rows = _cache(dense), CoreRows(backend.weights, core_row_names(family, shape.layers))
    steps = _steps(backend.decoder("decode_dense", backend.device(cache), {}), request, reference["tokens"])
    backend.drop("decode_dense")
    pairs = {
        f"logits of step {i}": (a, b) for i, (a, b) in enumerate(zip(steps, reference["step_logits"], strict=True))
    }
    diverged = _first_difference(steps, reference["step_logits"])
    gate("decode", "decode_dense", pairs, f"PyTorch: {len(steps)} greedy steps, {diverged}")

    everything = sparse_feeds(request, recipe, token_share=1.0)
    full = backend.host(backend.prefill(feeds | everything, "prefill"))
    pairs = {n: (full[n], dense[n]) for n in dense}
    gate("full budget, prefill", "prefill", pairs, "dense prefill")
    chosen = backend.host(backend.prefill(feeds | sparse_feeds(request, recipe), "prefill"))
    backend.drop("prefill")
    if recipe.neurons.in_decode:  # at full budget nothing depends on them
        error, worst = copy_error(backend.predictor, backend.weights, family, shape)
        gates.append(Gate("predictor", error, COPY_LIMIT, error <= COPY_LIMIT, "low-bit copies and the weights"))
        if not gates[-1].passed:
            fix = "no bundle was written; check memory and disk, or choose another neuron policy"
            raise GateFailed(
                f"differs by {error:.1e} (limit {COPY_LIMIT})", where=f"gate 'predictor', {worst}", fix=fix
            )
    decoder = backend.decoder("decode", backend.device(cache), every_neuron(rows))
    sparse = _steps(decoder, request, reference["tokens"], core_tokens=full.get("kept_tokens"), recipe=recipe)
    backend.drop("decode")
    pairs = {f"logits of step {i}": (a, b) for i, (a, b) in enumerate(zip(sparse, steps, strict=True))}
    gate("full budget, decode", "decode", pairs, "dense decode with every neuron and token")

    if recipe.has_turn:
        ids = reference["tokens"].tolist()
        feeds = request.step_feeds(ids, 0) | everything | {"image_mask": request.extended(ids).is_image}
        turn = backend.host(backend.turn(feeds | {"question": np.array([1])}, backend.device(cache)))
        backend.drop("turn")
        gate(
            "turn",
            "turn",
            {"logits": (turn["logits"][0], reference["step_logits"][-1])},
            f"PyTorch after {len(ids)} steps",
        )

    core = choose(chosen, recipe.neurons, shape, calibration)
    gates += _drift(backend, rows, core, recipe, request, chosen, dense, reference["tokens"], steps)
    return gates


def _drift(backend, rows, core, recipe, request, chosen, dense, tokens, steps) -> list[Gate]:
    """What the recipe's budget costs on the probe: no limit, the quality of answers is what `eval` measures."""
    mask = chosen.get("kept_mask") if recipe.tokens.cache == "cut" else None
    decoder = backend.decoder("decode", backend.device(_cache(chosen)), core.constants(rows))
    sparse = _steps(decoder, request, tokens, mask=mask, core_tokens=chosen.get("kept_tokens"), recipe=recipe)
    backend.drop("decode")
    first = np.concatenate([chosen["logits"], sparse[:-1]]), np.concatenate([dense["logits"], steps[:-1]])
    agree = float((first[0].argmax(-1) == first[1].argmax(-1)).mean())
    kl = float(divergences(first[1], first[0]).mean())
    kept = chosen["kept_tokens"].shape[1] if "kept_tokens" in chosen else request.tokens
    detail = (
        f"{kept} of {request.tokens} prompt tokens, {core.counts.mean():.0f} of {core.ffn} neurons, synthetic probe"
    )
    return [
        Gate("drift: KL to dense", kl, None, True, detail),
        Gate("drift: top-1 agreement", agree, None, True, detail),
    ]


def _steps(decoder, request, tokens, mask=None, core_tokens=None, recipe=None) -> np.ndarray:
    """Teacher-forced decode steps; logits [steps, V]."""
    return np.concatenate(
        [
            decoder.step(request.step_feeds(int(token), i, mask, core_tokens if _indexed(recipe) else None))
            for i, token in enumerate(tokens)
        ]
    )


def _indexed(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.tokens.cache == "index"


def _cache(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: v for n, v in outputs.items() if n.startswith("present.")}


def _first_difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    differ = np.flatnonzero(ours.argmax(-1) != theirs.argmax(-1))
    return f"first diverging token at step {differ[0]}" if len(differ) else "every token the same"
