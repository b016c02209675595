"""Speed of a bundle on made-up inputs, sparse beside dense in the same process; medians with spread.

random token ids and image embeddings -> prefill, row gather, decode steps, each timed, dense and sparse in turn
"""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..base import environment
from ..base.errors import InputError
from ..bundle.bundle import Bundle
from ..host.request import Request
from ..host.runner import Budget, Engine

IMAGE_TOKENS = 256


def measure(
    path: Path,
    prompt_tokens: int = 32,
    image_tokens: int | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    neuron_share: float | None = None,
    token_share: float | None = None,
    threads: int = 0,
    vision: bool = False,
    backend: str | None = None,
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
) -> dict[str, Any]:
    """Milliseconds per phase, dense and sparse. `vision` also times the vision graph, which is the same for both.

    backend None: the one that the bundle was built for.
    image_tokens None: IMAGE_TOKENS, or none where the model takes no pictures.
    Raises InputError, BundleError.
    """
    bundle = Bundle(path)
    engine = Engine(bundle, threads, backend=backend)
    if image_tokens or vision:
        engine.check_sees()
    if image_tokens is None:
        image_tokens = IMAGE_TOKENS if bundle.shape.sees else 0
    request, vision_feeds = _request(engine, prompt_tokens, image_tokens)
    bundle.wait_verified()
    budgets = {"dense": Budget(dense=True), "sparse": Budget(neuron_share=neuron_share, token_share=token_share)}
    times: dict[str, dict[str, list[float]]] = {n: {} for n in budgets}
    kept: dict[str, dict[str, int]] = {}

    def timed(name: str, phase: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        if counted:
            times[name].setdefault(phase, []).append(time.perf_counter() - started)
        return result

    for repeat in range(repeats + 1):
        counted = repeat > 0  # the first round loads the sessions and touches the pages
        for name, budget in budgets.items():
            progress(f"{name}, {'warm-up' if not counted else 'run'}", repeat, repeats)
            if vision and vision_feeds and budget.dense:
                timed(name, "vision", lambda: engine.backend.vision(vision_feeds))
            prefilled = timed(name, "prefill", lambda budget=budget: engine.prefill(request, budget))
            decoder = prefilled.decoder() if budget.dense else timed(name, "gather", prefilled.decoder)
            token = int(prefilled.logits[0].argmax())
            for step in range(new_tokens):
                logits = timed(name, "decode", lambda: decoder.step(prefilled.step_feeds(token, step)))  # noqa: B023
                token = int(logits[0].argmax())
            kept[name] = {"tokens": prefilled.kept_tokens.shape[1], "neurons": prefilled.neurons}
    phases = [_phase(p, times, repeats) for p in ("vision", "prefill", "gather", "decode")]
    rows = [r for p in phases for r in p["rows"]]
    return {
        "bundle": str(path),
        "seal": bundle.seal,
        "prompt_tokens": request.tokens,
        "image_tokens": request.image_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "kept": kept,
        "speedup": {p["phase"]: p["speedup"] for p in phases if p["speedup"]},
        "rows": rows,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "backend": engine.backend.name,
        "environment": environment.describe(threads, bundle.manifest["versions"]) | engine.backend.hardware,
        "notes": [
            f"{request.tokens} prompt tokens of which {request.image_tokens} are image tokens; "
            f"sparse keeps {kept['sparse']['tokens']} tokens and {kept['sparse']['neurons']} of {bundle.shape.ffn} neurons",
            "median and quartiles in ms; decode per token; dense and sparse alternate in one process",
            *engine.backend.notes,
        ],
    }


def _request(engine: Engine, prompt_tokens: int, image_tokens: int) -> tuple[Request, dict[str, np.ndarray] | None]:
    """A prompt of random words around one random picture."""
    shape, rng = engine.bundle.shape, np.random.default_rng(0)
    family = engine.bundle.family
    engine.check_length(prompt_tokens + image_tokens)  # before the vision graph runs over all of them
    words = rng.integers(0, shape.vocab, prompt_tokens)
    words[words == shape.image_token] = (shape.image_token + 1) % shape.vocab
    grid, feeds, embeds, ids = np.zeros((0, 3), np.int64), None, None, words
    if image_tokens:
        height = max(d for d in range(1, int(image_tokens**0.5) + 1) if image_tokens % d == 0)
        grid = np.array([[1, height * shape.merge, image_tokens // height * shape.merge]], np.int64)
        patches = rng.standard_normal((int(grid.prod()), shape.patch_dim)).astype(np.float32)
        feeds = family.vision_inputs(patches, grid, shape.merge)
        embeds = 0.02 * rng.standard_normal((image_tokens, shape.hidden)).astype(np.float32)
        head = prompt_tokens // 2
        ids = np.concatenate([words[:head], np.full(image_tokens, shape.image_token), words[head:]])
    elif not prompt_tokens:
        raise InputError("nothing to run", fix="give --prompt-tokens or --image-tokens")
    return engine.request(ids, grid, embeds), feeds


def _phase(phase: str, times: dict, repeats: int) -> dict[str, Any]:
    rows = []
    for name in times:
        values = sorted(1000 * t for t in times[name].get(phase, []))
        if not values:
            continue
        low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        rows.append({"phase": phase, "mode": name, "median_ms": mid, "q1_ms": low, "q3_ms": high, "n": len(values)})
    speedup = rows[0]["median_ms"] / rows[1]["median_ms"] if len(rows) == 2 else None
    for row in rows:
        row["speedup"] = speedup if row["mode"] == "sparse" else None
    return {"phase": phase, "rows": rows, "speedup": speedup}
