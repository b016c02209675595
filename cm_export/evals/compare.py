"""Accuracy beside its controls: the same questions dense, with the recipe's policies, at random, and by attention.

row = policies and budget ->  accuracy   exact match of free-running greedy answers, 95 % Wilson interval
                              kept       accuracy over dense accuracy, questions paired
                              kl, top1   next tokens against the dense model's, along the dense model's own answer
                              bits        that decode reads for each weight
                              prefill_ms, gather_ms, ms_per_token

The report is one JSON object: `task`, `rule`, `bundle`, its `seal`, `n`, `questions` (a key of them), `kinds`, `environment`,
`rows` (one object per row, keys as `_result` gives them), the three that everybody wants as `dense`, `sparse`, `random`, and
`table`, the same rows for people.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base import environment
from ..base.hashes import key_of
from ..base.metrics import divergence, kept_of_dense, spread, wilson
from ..bundle.bundle import Bundle
from ..bundle.predictor import predictor_share
from ..families import Shape
from ..host.backend import DEFAULT
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe
from ..recipe.vary import at_random, varied
from ..surgery import pipeline
from .exam import Exam, write
from .journal import Journal
from .other_policies import with_policies
from .task import Question, Task
from .weights_read import WeightsRead, counted_weights

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
    device: str | None = None,
) -> dict[str, Any]:
    """Ask every question in every row. Raises InputError, BundleError.

    `report`: where the caller will write the result; answers are noted beside it as they come, and a killed run goes on.
    `backend`: what the bundle's own graphs run on; rows with other policies are made in memory, for ONNX Runtime.
    `device`: of ONNX Runtime (None: the CPU).
    """
    bundle = Bundle(path)
    runner = Runner(bundle, threads, backend=backend, device=device)
    rows = _rows(runner.recipe, sweep, seed)
    for row in rows:  # before anything is asked
        pipeline.check_recipe(row.recipe, bundle.shape)
    bundle.wait_verified()
    comparison = Comparison(Exam(runner, task, progress))
    run = key_of(
        bundle=bundle.manifest,
        questions=[asdict(q) for q in task.questions],
        answers=[task.limits, task.rule],
        pictures=comparison.exam.fingerprint,
        threads=threads,
        reads="weights",  # answers that were noted before what they read was counted are asked again
        **({"control_tokens": True} if task.control_tokens else {}),
        **_other_backend(runner),
    )
    with Journal(report, run) as journal:
        if journal.resumed:
            progress(f"go on after {journal.resumed} answers of an earlier run")
        if journal.discarded:
            progress("start again: the earlier answers are of another bundle or other questions")
        dense = comparison.ask(Row(runner.recipe, Budget(dense=True)), runner, journal)
        results = [dense]
        runners = {runner.recipe.replace(): runner}
        for row in rows:
            results.append(comparison.ask(row, _runner_for(row, runner, runners), journal, dense))
            control = _random_like(row, results[-1])
            # Several policies at one budget share one control.
            if control.key not in {r["key"] for r in results}:
                results.append(comparison.ask(control, _runner_for(control, runner, runners), journal, dense))
        found = {
            "task": task.name,
            "rule": task.rule,
            "bundle": str(path),
            "seal": bundle.seal,
            "n": len(task.questions),
            # Reports of several bundles are compared question by question.
            "questions": key_of(questions=[asdict(q) for q in task.questions], rule=task.rule),
            "kinds": [q.kind for q in task.questions],
            "backend": runner.backend.name,
            "environment": environment.describe(threads, bundle.manifest["versions"]) | runner.backend.hardware,
            "decoding": runner.rule().to_dict(),
            "dense": dense,
            "sparse": results[1],
            "random": next((r for r in results[1:] if r["is_random"]), None),  # none where nothing is pruned
            "rows": results,
            "table": [_flat(r) for r in results],
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "notes": [
                f"accuracy: {task.rule}, free-running, {runner.rule()}; in brackets: 95 % Wilson interval",
                "bits/weight: that a decoded token reads for each weight, scales included; needed: this runtime reads more",
                "of dense: 95 % interval over paired questions (above 1: right where dense is wrong); "
                "KL and top-1 along the dense model's own answers"
                + (", of logits before any penalty" if runner.rule().repetition_penalty != 1 else ""),
                *_ran_on(runner, [r["policies"] for r in results], rows),
                *bundle.notes,
                *comparison.exam.notes,
            ],
            "picture_notes": comparison.exam.notes,
        }
    return found


def _other_backend(runner: Runner) -> dict[str, str]:
    """What tells answers of this backend from those that ONNX Runtime gives."""
    device = runner.backend.hardware.get("device")  # that of ONNX Runtime, where it is not the CPU
    return {} if runner.backend.name == DEFAULT and not device else {"backend": f"{runner.backend.name} {device or ''}"}


def _ran_on(runner: Runner, policies: list[str], rows: list[Row]) -> list[str]:
    """Remarks on a report whose rows did not all run on ONNX Runtime."""
    if runner.backend.name == DEFAULT:
        return runner.backend.notes if runner.device else []
    own = {"dense", *(r.policies for r in rows if r.recipe == runner.recipe)}
    others = [p for p in dict.fromkeys(policies) if p not in own]
    there = f"ran on ONNX Runtime, the others on {runner.backend.name}: their milliseconds do not compare"
    return [*runner.backend.notes, *([f"{', '.join(others)} {there}"] if others else [])]


def _runner_for(row: Row, runner: Runner, runners: dict[Recipe, Runner]) -> Runner:
    """The bundle under this row's policies. The last one only: each holds sessions of its own."""
    if row.recipe not in runners:
        for recipe in [r for r, other in runners.items() if other is not runner and r.neurons.policy != "random"]:
            del runners[recipe]
        runners[row.recipe] = with_policies(runner, row.recipe)
    return runners[row.recipe]


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


class Comparison:
    """An exam in several rows, and the dense model's own answers to compare with."""

    def __init__(self, exam: Exam):
        self.exam = exam
        questions, limits = exam.task.questions, exam.task.limits
        longest = max((limits[q.kind] for q in questions), default=1)
        n, room = len(questions), max(1, _KL_BYTES // (4 * longest * exam.runner.bundle.shape.vocab))
        self._compared = set(np.linspace(0, n - 1, min(n, _KL_QUESTIONS, room)).round().astype(int).tolist())
        self._reference: dict[int, tuple[list[int], np.ndarray]] = {}

    def reference(self, number: int) -> tuple[list[int], np.ndarray]:
        """The dense model's answer to a question and the logits [T,V] from which it was read."""
        if number not in self._reference:
            question = self.exam.task.questions[number]
            written = self.exam.answer(self.exam.runner, question, Budget(dense=True))
            self._reference[number] = written.ids, written.logits
        return self._reference[number]

    def ask(self, row: Row, runner: Runner, journal: Journal, dense: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every question in one row; those in the journal are taken from it."""
        shape, questions = runner.bundle.shape, self.exam.task.questions
        name = row.policies if row.budget.dense else f"{row.policies} {row.key[:4]}"
        answers = []
        for i, q in enumerate(questions):
            if i % 25 == 0:
                self.exam.progress(name, i, len(questions))
            answers.append(journal.get(row.key, i) or journal.add(row.key, i, **self._answer(row, runner, i, q)))
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
            **_read(shape, answers),
        }
        pruned = row.recipe.neurons if not row.budget.dense else None
        if pruned is not None and pruned.by_threshold:
            result["ffn_bytes_share"] = row.as_recipe.neurons.share  # what thresholds were calibrated to read
            return result | _result(questions, answers, dense)
        choosing = predictor_share(shape.hidden) if row.recipe.neurons.in_decode and not row.budget.dense else 0.0
        result["ffn_bytes_share"] = result["neuron_share"] + choosing  # read per token, rows of 16 bits
        return result | _result(questions, answers, dense)

    def _answer(self, row: Row, runner: Runner, number: int, question: Question) -> dict[str, Any]:
        # A random control that drops the same positions in every question would measure those positions.
        seed = (row.budget.seed or 0) + number
        budget = Budget(row.budget.dense, row.budget.neuron_share, row.budget.token_share, seed)
        written = self.exam.answer(runner, question, budget)
        right, said = self.exam.right(runner, question, written.ids)
        request, kept = written.prefilled.request, written.prefilled.kept_tokens[0]
        out = {
            "right": right,
            "said": said,
            "image_tokens": request.image_tokens,
            "image_tokens_kept": int(request.is_image[0, kept].sum()),
            "neurons_kept": written.prefilled.neurons,
            "prefill_ms": written.prefill_ms,
            "gather_ms": written.gather_ms,
            "step_ms": written.median_step_ms,
            "read_bytes": written.read.bytes,
            "read_exact": written.read.exact,
        }
        if number in self._compared:
            if row.budget.dense:
                self._reference[number] = written.ids, written.logits
            wanted, reference = self.reference(number)
            logits = written.logits
            if written.ids != wanted:
                logits = write(runner, written.prefilled, self.exam.task.limits[question.kind], wanted).logits
            out["kl"], out["top1"] = divergence(reference, logits)
            out["next_tokens"] = len(reference)
        return out


def _read(shape: Shape, answers: list[dict]) -> dict[str, Any]:
    """What a decoded token reads of the weights, mean over answers; not exact: what the policy needs at least."""
    exact = all(a["read_exact"] for a in answers)
    read = WeightsRead(float(np.mean([a["read_bytes"] for a in answers])), counted_weights(shape), exact)
    return {"bits_read_per_weight": read.bits, "weight_bytes_read": read.bytes, "read_exact": exact}


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
    out["bits/weight"] = f"{result['bits_read_per_weight']:.2f}" + ("" if result["read_exact"] else " needed")
    out["ms/token"] = round(result["ms_per_token"]["median"], 2) if result["ms_per_token"] else None
    return out | {"n": result["n"]}
