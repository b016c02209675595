"""Speed of a bundle on made-up inputs, sparse beside dense in the same process; medians with spread.

random token ids and image embeddings -> prefill, row gather, decode steps, each timed, dense and sparse in turn
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base import environment
from ..base.errors import InputError
from ..bundle.bundle import Bundle
from ..families import Picture, Pictures, Tower
from ..host.decode import Spent, decode
from ..host.request import Request
from ..host.runner import Budget, Prefilled, Runner
from .bandwidth import read_bandwidth
from .weights_read import Steps, WeightsRead

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
    device: str | None = None,
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
) -> dict[str, Any]:
    """Milliseconds per phase, dense and sparse. `vision` also times the vision graph, which is the same for both.

    backend None: the one that the bundle was built for. device: of ONNX Runtime (None: the CPU).
    image_tokens None: about IMAGE_TOKENS, as many as a picture can have, or none where the model takes no pictures.
    Raises InputError, BundleError.
    """
    bundle = Bundle(path)
    runner = Runner(bundle, threads, backend=backend, device=device)
    if image_tokens is None:
        image_tokens = likely(runner.tower, IMAGE_TOKENS) if bundle.shape.sees else 0
    runner.check_length(prompt_tokens + image_tokens + new_tokens)  # before so many patches are made
    pictures = _pictures(runner, image_tokens) if image_tokens or vision else []
    request = made_up_request(runner, prompt_tokens, pictures)
    seen = [runner.tower.feeds([picture]) for picture in pictures] if vision else []
    bundle.wait_verified()
    budgets = {"dense": Budget(dense=True), "sparse": Budget(neuron_share=neuron_share, token_share=token_share)}
    times: dict[str, dict[str, list[float]]] = {n: {} for n in budgets}
    kept: dict[str, dict[str, int]] = {}
    read: dict[str, WeightsRead] = {}
    for repeat in range(repeats + 1):
        for name, budget in budgets.items():
            progress(f"{name}, {'warm-up' if not repeat else 'run'}", repeat, repeats)
            # The first round loads the sessions and touches the pages: it is not counted.
            of = times[name] if repeat else {}
            if seen and budget.dense:
                started = time.perf_counter()
                for feeds in seen:
                    runner.backend.vision(feeds)
                of.setdefault("vision", []).append(time.perf_counter() - started)
            prefilled, read[name] = _timed(runner, request, budget, new_tokens, of)
            kept[name] = {"tokens": prefilled.kept_tokens.shape[1], "neurons": prefilled.neurons}
    phases = [_phase(p, times, repeats) for p in ("vision", "prefill", "gather", "decode")]
    rows = [r for p in phases for r in p["rows"]]
    progress("measure how fast memory is read")
    bandwidth = read_bandwidth(runner.backend.threads or environment.default_threads())
    for row in rows:
        found = read[row["mode"]]
        if row["phase"] == "decode" and found.exact:
            row["read_mb"] = found.bytes / 1e6
            row["of_bandwidth"] = found.bytes / (row["median_ms"] / 1000) / bandwidth
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
        "read_bandwidth": bandwidth,
        "bits_read_per_weight": {name: found.bits for name, found in read.items()},
        "peak_memory_bytes": environment.peak_memory_bytes(),
        "backend": runner.backend.name,
        "environment": environment.describe(threads, bundle.manifest["versions"]) | runner.backend.hardware,
        "notes": [
            f"{request.tokens} prompt tokens of which {request.image_tokens} are image tokens; "
            f"sparse keeps {kept['sparse']['tokens']} tokens and {kept['sparse']['neurons']} of {bundle.shape.ffn} neurons",
            "median and quartiles in ms; decode per token, the most likely one, of which the choice is not timed; "
            "dense and sparse alternate in one process",
            _about_bytes(read, bandwidth),
            *runner.backend.notes,
            *bundle.notes,
        ],
    }


def _about_bytes(read: dict[str, WeightsRead], bandwidth: float) -> str:
    """What was read of the weights for a token."""
    needs = " needed (this runtime reads more than that)"
    bits = ", ".join(f"{name} {found.bits:.2f}{'' if found.exact else needs}" for name, found in read.items())
    return f"bits read per weight, scales included: {bits}; memory is read at {bandwidth / 1e9:.1f} GB/s"


def _timed(
    runner: Runner, request: Request, budget: Budget, new_tokens: int, times: dict[str, list[float]]
) -> tuple[Prefilled, WeightsRead]:
    """One prefill and `new_tokens` decode steps, their seconds added to `times` by phase; what a step has read."""
    started = time.perf_counter()
    prefilled = runner.prefill(request, budget)
    times.setdefault("prefill", []).append(time.perf_counter() - started)
    spent: list[Spent] = []
    steps = Steps(runner)
    with steps.counted():
        for _ in decode(runner.backend, [prefilled.row(limit=new_tokens + 1)], spent.append):
            pass
    if not budget.dense:
        times.setdefault("gather", []).append(sum(s.gather for s in spent))
    times.setdefault("decode", []).extend(s.step for s in spent)
    return prefilled, steps.per_step(prefilled, len(spent))


def likely(tower: Tower, wanted: int) -> int:
    """The number of image tokens nearest to `wanted` that pictures can have."""
    for distance in itertools.count():
        for tokens in (wanted - distance, wanted + distance):
            with contextlib.suppress(InputError):
                if tokens > 0 and tower.sized(tokens, np.random.default_rng(0)):
                    return tokens
    raise AssertionError  # every tower has pictures of some size


def _pictures(runner: Runner, image_tokens: int) -> list[Picture]:
    """Made-up pictures of so many image tokens together. Raises InputError where the model takes none."""
    tower = runner.tower
    return tower.sized(image_tokens, np.random.default_rng(0)) if image_tokens else []


def made_up_request(runner: Runner, prompt_tokens: int, pictures: Sequence[Picture] = ()) -> Request:
    """A prompt of random words around made-up pictures. Raises InputError."""
    shape, rng = runner.bundle.shape, np.random.default_rng(0)
    image_tokens = sum(p.tokens for p in pictures)
    words = rng.integers(0, shape.vocab, prompt_tokens)
    words[np.isin(words, shape.seen_tokens)] = (max(shape.seen_tokens, default=0) + 1) % shape.vocab
    if not prompt_tokens and not image_tokens:
        raise InputError("nothing to run", fix="give --prompt-tokens or --image-tokens")
    head, outputs = prompt_tokens // 2, {}
    ids = np.concatenate([words[:head], np.full(image_tokens, shape.image_token), words[head:]])
    for port in runner.tower.outputs if pictures else ():
        outputs[port.name] = (0.02 * rng.standard_normal((image_tokens, *port.row))).astype(np.float32)
    return runner.request(ids, Pictures(outputs, tuple(p.layout for p in pictures)))


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
