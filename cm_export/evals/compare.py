"""Accuracy beside its controls: the same questions dense, with the recipe's policies, at random, and by attention.

row = policies and budget ->  accuracy   exact match of free-running greedy answers, 95 % Wilson interval
                              kept       accuracy over dense accuracy, questions paired
                              kl, top1   next tokens against the dense model's, along the dense model's own answer
                              prefill_ms, gather_ms, ms_per_token

The report is one JSON object: `task`, `rule`, `bundle`, its `seal`, `n`, `environment`, `rows` (one object per row, keys as
`_result` gives them), the three that everybody wants as `dense`, `sparse`, `random`, and `table`, the same rows for people.
"""

import hashlib
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..base import environment
from ..base.hashes import key_of
from ..base.metrics import divergence, kept_of_dense, spread, wilson
from ..bundle.bundle import Bundle
from ..bundle.predictor import predictor_share
from ..host.backend import DEFAULT
from ..host.runner import Budget, Engine, Prefilled
from ..recipe.recipe import Recipe
from ..recipe.vary import at_random, varied
from ..surgery import pipeline
from ..surgery.neuron_constants import neuron_constants
from .journal import Journal
from .task import Question, Task

# (neuron share, token share) of the rows below the recipe's own budget: what less gives, whatever it is.
LOWER = ((0.4, 0.25), (0.2, 0.11))
_KL_QUESTIONS, _KL_BYTES = 200, 2**28  # questions whose dense next-token distributions are kept for comparison


@dataclass(frozen=True)
class Sweep:
    """Policies and budgets to compare, every one with every other; nothing named: the recipe, and two lower budgets."""

    neurons: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    neuron_shares: tuple[float, ...] = ()
    token_shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """A way to answer: its policies and its budget."""

    recipe: Recipe
    budget: Budget

    @property
    def policies(self) -> str:
        return "dense" if self.budget.dense else f"{self.recipe.neurons.policy} + {self.recipe.tokens.policy}"

    @property
    def as_recipe(self) -> Recipe:
        """The recipe of a bundle that answers this way unasked; of the dense row, the one that it was measured beside."""
        neurons, tokens = self.budget.neuron_share, self.budget.token_share
        if tokens is None:
            return self.recipe.replace(neurons__share=neurons)
        # At run time a first cut never keeps less than the second one (request.sparse_feeds); a recipe must say so.
        cut = self.recipe.tokens
        first = max(cut.first_share, tokens) if cut.first != "none" else None
        return self.recipe.replace(
            neurons__share=neurons, tokens__share=tokens, tokens__budget="share", tokens__first_share=first
        )

    @property
    def key(self) -> str:
        return key_of(recipe=self.recipe.to_dict(), budget=asdict(self.budget))


def compare(
    path: Path,
    task: Task,
    sweep: Sweep = Sweep(),
    seed: int | None = None,
    threads: int = 0,
    report: Path | None = None,
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
    backend: str | None = None,
) -> dict[str, Any]:
    """Ask every question in every row. Raises InputError, BundleError.

    `report`: where the caller will write the result; answers are noted beside it as they come, and a killed run goes on.
    `backend`: what the bundle's own graphs run on; rows with other policies are made in memory, for ONNX Runtime.
    """
    bundle = Bundle(path)
    engine = Engine(bundle, threads, backend=backend)
    rows = _rows(engine.recipe, sweep, seed)
    for row in rows:  # before anything is asked
        pipeline.check_recipe(row.recipe, bundle.shape)
    bundle.wait_verified()
    desk = _Desk(engine, task, progress)
    run = key_of(
        bundle=bundle.manifest,
        questions=[asdict(q) for q in task.questions],
        answers=[task.limits, task.rule],
        pictures=desk.fingerprint,
        threads=threads,
        **_elsewhere(engine),
    )
    with Journal(report, run) as journal:
        if journal.resumed:
            progress(f"go on after {journal.resumed} answers of an earlier run")
        if journal.discarded:
            progress("start again: the earlier answers are of another bundle or other questions")
        dense = desk.ask(Row(engine.recipe, Budget(dense=True)), engine, journal)
        results = [dense]
        engines = {engine.recipe.replace(): engine}
        for row in rows:
            results.append(desk.ask(row, _engine_for(row, engine, engines), journal, dense))
            control = _random_like(row, results[-1])
            # Several policies at one budget share one control.
            if control.key not in {r["key"] for r in results}:
                results.append(desk.ask(control, _engine_for(control, engine, engines), journal, dense))
        found = {
            "task": task.name,
            "rule": task.rule,
            "bundle": str(path),
            "seal": bundle.seal,
            "n": len(task.questions),
            "backend": engine.backend.name,
            "environment": environment.describe(threads, bundle.manifest["versions"]) | engine.backend.hardware,
            "dense": dense,
            "sparse": results[1],
            "random": next((r for r in results[1:] if r["is_random"]), None),  # none where nothing is pruned
            "rows": results,
            "table": [_flat(r) for r in results],
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "notes": [
                f"accuracy: {task.rule}, greedy, free-running; in brackets: 95 % Wilson interval",
                "of dense: 95 % interval over paired questions; KL and top-1 along the dense model's own answers",
                *_ran_on(engine, [r["policies"] for r in results], rows),
            ],
        }
    return found


def _elsewhere(engine: Engine) -> dict[str, str]:
    """What tells answers of this backend from those that ONNX Runtime gives."""
    return {} if engine.backend.name == DEFAULT else {"backend": engine.backend.name}


def _ran_on(engine: Engine, policies: list[str], rows: list[Row]) -> list[str]:
    """Remarks on a report whose rows did not all run on ONNX Runtime."""
    if engine.backend.name == DEFAULT:
        return []
    own = {"dense", *(r.policies for r in rows if r.recipe == engine.recipe)}
    others = [p for p in dict.fromkeys(policies) if p not in own]
    there = f"ran on ONNX Runtime, the others on {engine.backend.name}: their milliseconds do not compare"
    return [*engine.backend.notes, *([f"{', '.join(others)} {there}"] if others else [])]


def with_policies(engine: Engine, recipe: Recipe) -> Engine:
    """The same bundle under other policies: its dense graphs are rewritten in memory."""
    bundle = engine.bundle
    pipeline.check_recipe(recipe, bundle.shape)

    def graph(name: str) -> Path | onnx.ModelProto:
        if name not in ("prefill", "decode", "turn"):
            return bundle.graph(name)
        source = "prefill_dense" if name == "prefill" else "decode_dense"
        dense = onnx.load(bundle.graph(source), load_external_data=False)
        if name == "decode":
            copies = bundle.predictor.tensors if recipe.neurons.in_decode else None
            return pipeline.sparse_decode(dense, bundle.family, bundle.shape, recipe, copies)[0]
        constants = neuron_constants(recipe, bundle.weights, bundle.family, bundle.shape, bundle.calibration)
        rewrite = pipeline.turn if name == "turn" else pipeline.sparse_prefill
        return rewrite(dense, bundle.family, bundle.shape, recipe, constants)[0]

    return Engine(bundle, engine.backend.threads, recipe, graph)


def _engine_for(row: Row, engine: Engine, engines: dict[Recipe, Engine]) -> Engine:
    """The bundle under this row's policies. The last one only: each holds sessions of its own."""
    if row.recipe not in engines:
        for recipe in [r for r, e in engines.items() if e is not engine and r.neurons.policy != "random"]:
            del engines[recipe]
        engines[row.recipe] = with_policies(engine, row.recipe)
    return engines[row.recipe]


def _rows(recipe: Recipe, sweep: Sweep, seed: int | None) -> list[Row]:
    """What was asked for, or the recipe's policies at its own budget and below; and attention as a control."""
    budgets = [(n, t) for n in sweep.neuron_shares or (None,) for t in sweep.token_shares or (None,)]
    if sweep == Sweep():
        budgets += LOWER
    out = []
    for neuron_share, token_share in budgets:
        policies = [
            (n, t) for n in sweep.neurons or (recipe.neurons.policy,) for t in sweep.tokens or (recipe.tokens.policy,)
        ]
        if any(t not in ("attention", "dense") for _, t in policies):
            policies.append((policies[0][0], "attention"))
        for neurons, tokens in dict.fromkeys(policies):
            budgeted = "share" if token_share is not None and tokens != "dense" else None
            chosen = varied(recipe, neurons__policy=neurons, tokens__policy=tokens, tokens__budget=budgeted)
            budget = Budget(
                neuron_share=None if neurons == "dense" else neuron_share,
                token_share=None if tokens == "dense" else token_share,
                seed=seed,
            )
            out.append(Row(chosen, budget))
    return list(dict.fromkeys(out))


def _random_like(row: Row, result: dict[str, Any]) -> Row:
    """Random choices of the size that the row was measured to keep; what it does not prune stays whole."""
    # as many bytes: what another policy reads to choose, a random set may spend on neurons
    neurons, tokens = min(1.0, result["ffn_bytes_share"]), result["token_share"]
    # One recipe for all sizes, so that they share their sessions; the sizes are asked for with each question.
    recipe = at_random(row.recipe, row.recipe.neurons.share, row.recipe.tokens.share)
    budget = Budget(
        neuron_share=neurons if recipe.neurons.policy != "dense" else None,
        token_share=tokens if recipe.tokens.policy != "dense" else None,
        seed=row.budget.seed,
    )
    return Row(recipe, budget)


class _Desk:
    """The questions with their pictures already seen, and the dense model's own answers to compare with."""

    def __init__(self, engine: Engine, task: Task, progress: Callable[..., None]):
        self.engine, self.task, self.progress = engine, task, progress
        names = sorted({p for q in task.questions for p in q.pictures})
        digest, self._seen = hashlib.sha256(), {}
        for i, name in enumerate(names):
            if i % 50 == 0:
                progress("look at the pictures", i, len(names))
            picture = task.open_picture(name)
            digest.update(repr(picture.size).encode() + picture.tobytes())
            self._seen[name] = engine.embed([picture])
        self.fingerprint = digest.hexdigest()
        longest = max((task.limits[q.kind] for q in task.questions), default=1)
        n = len(task.questions)
        room = max(1, _KL_BYTES // (4 * longest * engine.bundle.shape.vocab))
        self._compared = set(np.linspace(0, n - 1, min(n, _KL_QUESTIONS, room)).round().astype(int).tolist())
        self._reference: dict[int, tuple[list[int], np.ndarray]] = {}

    @cached_property
    def _unseen(self) -> tuple[None, np.ndarray]:
        return self.engine.embed([])

    def prefill(self, engine: Engine, question: Question, budget: Budget) -> Prefilled:
        embeds, grids = zip(*(self._seen[p] for p in question.pictures), strict=True) if question.pictures else ((), ())
        grid = np.concatenate(grids) if grids else self._unseen[1]
        ids = engine.chat.encode(
            question.text, None, engine.bundle.family.image_tokens(grid, engine.bundle.shape.merge)
        )
        return engine.prefill(engine.request(ids, grid, np.concatenate(embeds) if embeds else None), budget)

    def reference(self, number: int) -> tuple[list[int], np.ndarray]:
        """The dense model's answer to a question and the logits [T,V] from which it was read."""
        if number not in self._reference:
            question = self.task.questions[number]
            prefilled = self.prefill(self.engine, question, Budget(dense=True))
            ids, logits, _, _ = _decode(self.engine, prefilled, self.task.limits[question.kind])
            self._reference[number] = ids, logits
        return self._reference[number]

    def ask(self, row: Row, engine: Engine, journal: Journal, dense: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every question in one row; those in the journal are taken from it."""
        shape = engine.bundle.shape
        name = row.policies if row.budget.dense else f"{row.policies} {row.key[:4]}"
        answers = []
        for i, q in enumerate(self.task.questions):
            if i % 25 == 0:
                self.progress(name, i, len(self.task.questions))
            answers.append(journal.get(row.key, i) or journal.add(row.key, i, **self._answer(row, engine, i, q)))
        kept, pictures = (sum(a[k] for a in answers) for k in ("image_tokens_kept", "image_tokens"))
        result = {
            "key": row.key,
            "policies": row.policies,
            "is_random": "random" in (row.recipe.neurons.policy, row.recipe.tokens.policy) and not row.budget.dense,
            "neurons": "dense" if row.budget.dense else row.recipe.neurons.policy,
            "tokens": "dense" if row.budget.dense else row.recipe.tokens.policy,
            "prune_layer": row.recipe.tokens.prune_layer,
            "recipe": row.as_recipe.to_dict(),
            "neuron_share": answers[0]["neurons_kept"] / shape.ffn,  # measured, as is the next
            "token_share": kept / pictures if pictures else 1.0,
        }
        choosing = predictor_share(shape.hidden) if row.recipe.neurons.in_decode and not row.budget.dense else 0.0
        result["ffn_bytes_share"] = result["neuron_share"] + choosing  # read per token, rows of 16 bits
        return result | _result(self.task.questions, answers, dense)

    def _answer(self, row: Row, engine: Engine, number: int, question: Question) -> dict[str, Any]:
        # A random control that drops the same positions in every question would measure those positions.
        seed = (row.budget.seed or 0) + number
        budget = Budget(row.budget.dense, row.budget.neuron_share, row.budget.token_share, seed)
        started = time.perf_counter()
        prefilled = self.prefill(engine, question, budget)
        prefill_ms = 1000 * (time.perf_counter() - started)
        limit = self.task.limits[question.kind]
        ids, logits, gather_ms, step_ms = _decode(engine, prefilled, limit)
        said = engine.chat.decode(ids).strip()
        request = prefilled.request
        out = {
            "right": any(self.task.same(said, right) for right in question.answers),
            "said": said,
            "image_tokens": request.image_tokens,
            "image_tokens_kept": int(request.is_image[0, prefilled.kept_tokens[0]].sum()),
            "neurons_kept": prefilled.neurons,
            "prefill_ms": prefill_ms,
            "gather_ms": gather_ms,
            "step_ms": float(np.median(step_ms)) if step_ms else None,
        }
        if number in self._compared:
            if row.budget.dense:
                self._reference[number] = ids, logits
            wanted, reference = self.reference(number)
            if ids != wanted:
                _, logits, _, _ = _decode(engine, prefilled, limit, wanted)
            out["kl"], out["top1"] = divergence(reference, logits)
            out["next_tokens"] = len(reference)
        return out


def _decode(
    engine: Engine, prefilled: Prefilled, limit: int, forced: list[int] | None = None
) -> tuple[list[int], np.ndarray, float | None, list[float]]:
    """Greedy ids up to a stop id (or `forced` ids), the logits [T,V] before each of them and before the stop, and times."""
    ids, rows, decoder, gather_ms, step_ms = [], [prefilled.logits[0]], None, None, []
    while len(ids) < limit:
        token = int(rows[-1].argmax()) if forced is None else forced[len(ids)] if len(ids) < len(forced) else None
        if token is None or (forced is None and token in engine.chat.stop_ids):
            break
        ids.append(token)
        if len(ids) == limit:
            break
        started = time.perf_counter()
        if decoder is None:
            decoder = prefilled.decoder()
            gather_ms, started = 1000 * (time.perf_counter() - started), time.perf_counter()
        rows.append(decoder.step(prefilled.step_feeds(token, len(ids) - 1))[0])
        step_ms.append(1000 * (time.perf_counter() - started))
    return ids, np.stack(rows), gather_ms, step_ms


def _result(questions: list[Question], answers: list[dict], dense: dict[str, Any] | None) -> dict[str, Any]:
    """The figures of one row over its answers."""
    right = np.array([a["right"] for a in answers])
    base = right if dense is None else np.array(dense["right"])
    kinds = {}
    for kind in dict.fromkeys(q.kind for q in questions):
        chosen = np.array([q.kind == kind for q in questions])
        kinds[kind] = _accuracy(right[chosen], base[chosen])
    compared = [a for a in answers if "kl" in a]
    weight = sum(a["next_tokens"] for a in compared)
    out = _accuracy(right, base) | {
        "kinds": kinds,
        "kl": sum(a["kl"] * a["next_tokens"] for a in compared) / weight if weight else None,
        "top1": sum(a["top1"] * a["next_tokens"] for a in compared) / weight if weight else None,
        "next_tokens": weight,
        "right": right.tolist(),
    }
    for key, name in (("prefill_ms", "prefill_ms"), ("gather_ms", "gather_ms"), ("step_ms", "ms_per_token")):
        values = [a[key] for a in answers if a[key] is not None]
        out[name] = spread(values) if values else None
    for key in ("image_tokens", "image_tokens_kept", "neurons_kept"):
        out[key] = float(np.mean([a[key] for a in answers]))
    return out


def _accuracy(right: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    n, good = len(right), int(right.sum())
    kept, interval = kept_of_dense(base, right)
    low, high = wilson(good, n)
    return {"accuracy": good / n, "ci": [low, high], "of_dense": kept, "of_dense_ci": interval, "n": n}


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """One row of the table for people."""
    choosing = result["ffn_bytes_share"] - result["neuron_share"]
    neurons = f"{result['neuron_share']:.0%} neurons" + (f" and {choosing:.0%} to choose" if choosing else "")
    budget = f"{neurons}, {result['token_share']:.0%} tokens".replace("%", " %")
    out: dict[str, Any] = {"answered by": result["policies"] + ("" if result["policies"] == "dense" else f", {budget}")}
    kinds = result["kinds"] if len(result["kinds"]) > 1 else {}
    for kind, k in {**kinds, "all": result}.items():
        low, high = k["ci"]
        out[kind] = (
            f"{k['accuracy']:.4f} [{low:.3f}, {high:.3f}]"
            if kind == "all" or len(kinds) < 4
            else f"{k['accuracy']:.3f}"
        )
    if result["of_dense"] is not None and result["policies"] != "dense":
        low, high = result["of_dense_ci"]
        out["of dense"] = f"{result['of_dense']:.4f} [{low:.3f}, {high:.3f}]"
    else:
        out["of dense"] = "-"
    out["KL"] = None if result["kl"] is None else round(result["kl"], 4)
    out["top-1"] = None if result["top1"] is None else round(result["top1"], 4)
    out["ms/token"] = round(result["ms_per_token"]["median"], 2) if result["ms_per_token"] else None
    return out | {"n": result["n"]}
