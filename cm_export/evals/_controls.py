"""Accuracy beside its controls: the same questions dense, with the recipe's policies, and with random choices.

row = (neurons, tokens) -> exact match per kind, with the 95 % Wilson interval and the share of dense that is kept
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..bundle import Bundle
from ..generate import Budget, Engine
from ..neuron_constants import neuron_constants
from ..recipe import Recipe
from ..surgery import pipeline

# (neuron share, token share) of the rows below the recipe's own budget: what less gives, whatever it is.
LOWER = ((0.4, 0.25), (0.2, 0.11))


@dataclass(frozen=True)
class Question:
    """One question about one picture and the only answer that counts as right."""

    kind: str
    image: str
    text: str
    answer: str


@dataclass(frozen=True)
class Row:
    """A way to answer: its name, the policies and the budget."""

    name: str
    recipe: Recipe
    budget: Budget


def compare(
    path: Path,
    task: str,
    questions: list[Question],
    max_new_tokens: dict[str, int],
    neuron_share: float | None = None,
    token_share: float | None = None,
    seed: int | None = None,
    threads: int = 0,
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
) -> dict[str, Any]:
    """Ask every question in every row; returns rows for the table and `dense`, `sparse`, `random` for machines."""
    from ..images import open_image

    bundle = Bundle(path)
    main = Engine(bundle, threads)
    bundle.wait_verified()
    seen: dict[str, Any] = {}
    for i, image in enumerate(sorted({q.image for q in questions})):
        if i % 50 == 0:
            progress("look at the pictures", i, len(seen))
        seen[image] = main.embed([open_image(image)])
    results = [_ask(main, Row("dense", main.recipe, Budget(dense=True)), questions, seen, max_new_tokens, progress)]
    random = None
    for row in _rows(main.recipe, neuron_share, token_share, seed):
        results.append(_ask(main, row, questions, seen, max_new_tokens, progress))
        control = _random_like(row, results[-1])
        random = random or with_policies(main, control.recipe)
        results.append(_ask(random, control, questions, seen, max_new_tokens, progress))
    dense = results[0]
    for result in results:
        for kind in dense["kinds"]:
            base = dense["kinds"][kind]["accuracy"]
            result["kinds"][kind]["of_dense"] = result["kinds"][kind]["accuracy"] / base if base else None
    table = [_flat(r) for r in results]
    return {
        "task": task,
        "bundle": str(path),
        "questions": {k: dense["kinds"][k]["n"] for k in dense["kinds"]},
        "dense": results[0],
        "sparse": results[1],
        "random": results[2],
        "rows": table,
        "details": results,
        "notes": ["accuracy: exact match, greedy, free-running; in brackets: 95 % Wilson interval"],
    }


def with_policies(engine: Engine, recipe: Recipe) -> Engine:
    """The same bundle under other policies: its dense graphs are rewritten in memory."""
    bundle = engine.bundle
    pipeline.check_recipe(recipe, bundle.shape)

    def graph(name: str) -> Path | onnx.ModelProto:
        if name not in ("prefill", "decode"):
            return bundle.graph(name)
        dense = onnx.load(bundle.graph(f"{name}_dense"), load_external_data=False)
        if name == "decode":
            return pipeline.sparse_decode(dense, bundle.family, bundle.shape, recipe)[0]
        constants = neuron_constants(recipe, bundle.weights, bundle.family, bundle.shape, bundle.calibration)
        return pipeline.sparse_prefill(dense, bundle.family, bundle.shape, recipe, constants)[0]

    return Engine(bundle, engine.backend.threads, recipe, graph)


def _rows(recipe: Recipe, neuron_share: float | None, token_share: float | None, seed: int | None) -> list[Row]:
    """The recipe's policies at its own (or the asked) budget and, if none was asked, below it."""
    lower = LOWER if neuron_share is None and token_share is None else ()
    out = []
    for neurons, tokens in ((neuron_share, token_share), *lower):
        budget = Budget(
            neuron_share=None if recipe.neurons.policy == "dense" else neurons,
            token_share=None if recipe.tokens.policy == "dense" else tokens,
            seed=seed,
        )
        row = Row(f"{recipe.neurons.policy} + {recipe.tokens.policy}", recipe, budget)
        if row not in out:
            out.append(row)
    return out


def _random_like(row: Row, result: dict[str, Any]) -> Row:
    """Random choices of the size that the row was measured to keep; what it does not prune stays whole."""
    policies = {part: "random" for part in ("neurons", "tokens") if getattr(row.recipe, part).policy != "dense"}
    # Without a mean in place of dropped neurons: a random set is better off without (benchmarks/neuron_policies.py).
    recipe = row.recipe.replace(
        **{f"{part}__policy": name for part, name in policies.items()}, tokens__budget="share", neurons__fill="none"
    )
    budget = Budget(
        neuron_share=result["neuron_share"] if "neurons" in policies else None,
        token_share=result["token_share"] if "tokens" in policies else None,
        seed=row.budget.seed,
    )
    return Row(f"{recipe.neurons.policy} + {recipe.tokens.policy}", recipe, budget)


def _ask(engine: Engine, row: Row, questions, seen, limits, progress) -> dict[str, Any]:
    started, right, total, shape = time.perf_counter(), {}, {}, engine.bundle.shape
    neurons, kept, pictures = shape.ffn, 0, 0
    for i, q in enumerate(questions):
        if i % 25 == 0:
            progress(row.name, i, len(questions))
        embeds, grid = seen[q.image]
        ids = engine.chat.encode(q.text, None, engine.bundle.family.image_tokens(grid, engine.bundle.shape.merge))
        # A random control that drops the same positions in every question would measure those positions.
        budget = Budget(row.budget.dense, row.budget.neuron_share, row.budget.token_share, (row.budget.seed or 0) + i)
        prefilled = engine.prefill(engine.request(ids, grid, embeds), budget)
        neurons, pictures = prefilled.neurons, pictures + prefilled.request.image_tokens
        kept += int(prefilled.request.is_image[0, prefilled.kept_tokens[0]].sum())
        answer = engine.chat.decode(list(engine.tokens(prefilled, limits[q.kind], engine.chat.stop_ids))).strip()
        right[q.kind] = right.get(q.kind, 0) + (answer == q.answer)
        total[q.kind] = total.get(q.kind, 0) + 1
    kinds = {}
    for kind, n in total.items():
        low, high = wilson(right[kind], n)
        kinds[kind] = {"accuracy": right[kind] / n, "low": low, "high": high, "right": right[kind], "n": n}
    everything = sum(right.values()), sum(total.values())
    low, high = wilson(*everything)
    shares = neurons / shape.ffn, kept / pictures if pictures else 1.0
    budget = "" if row.budget.dense else f", {shares[0]:.0%} neurons, {shares[1]:.0%} tokens"
    return {
        "name": row.name + budget.replace("%", " %"),
        "accuracy": everything[0] / everything[1],
        "low": low,
        "high": high,
        "n": everything[1],
        "neuron_share": shares[0],  # measured, as is the next
        "token_share": shares[1],
        "kinds": kinds,
        "seconds": time.perf_counter() - started,
    }


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """One row of the table for people."""
    out: dict[str, Any] = {"answered by": result["name"]}
    for kind, k in result["kinds"].items():
        out[kind] = f"{k['accuracy']:.4f} [{k['low']:.3f}, {k['high']:.3f}]"
        out[f"{kind} of dense"] = "-" if k["of_dense"] is None else f"{k['of_dense']:.4f}"
    return out | {"n": result["n"], "s": round(result["seconds"], 1)}


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    mid, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, mid - half), min(1.0, mid + half)
