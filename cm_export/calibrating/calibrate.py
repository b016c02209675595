"""Measure a calibration: the bundle's dense model answers prompts, and its FFNs are watched while it writes.

prompt -> dense greedy answer a_1..a_T -> one prefill over prompt + answer, z of every layer at the answer's tokens
                                       -> decode of the same answer with one layer sparse at a time: KL to dense
                                       -> the same answer after a cut of the image tokens at each layer (prune_layers.py)

Only generated tokens count: an offline prior from prompts says little about decode (GLASS, arXiv 2508.14302, section 3).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from ..base import by_name, json_lines
from ..base.core_index import neuron_count, select_core_neurons
from ..base.errors import InputError
from ..base.metrics import divergences
from ..bundle.calibration import Calibration, checkpoint_id
from ..bundle.names import core_row_names
from ..evals.other_policies import with_policies
from ..evals.task import OWN_TASKS
from ..families import Pictures
from ..host.core_set import CoreSet
from ..host.decode import Row, decode, sampled, teacher_forced
from ..host.images import given, opened
from ..host.picture_notes import Note, counted
from ..host.request import Request, prefill_feeds
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe
from ..surgery.neuron_constants import neuron_constants
from ..surgery.report_activations import report_activations
from . import prune_layers
from .cluster import cluster

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)  # of one layer's neurons, at which its sensitivity is measured
PROFILE_TOKENS = 512  # tokens whose energies are kept for clustering: [512,F] float16 per layer
SENSITIVITY_TOKENS = 64  # of one answer, at most
OWN_WORDS = 8  # length of the random beginnings from which a model without prompts writes
_LIBRARIES = ("numpy", "onnxruntime")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the pictures it is about."""

    text: str
    images: tuple[Path | str, ...] = ()  # what `open` opens
    open: Callable[[Any], Any] = opened


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON Lines file: {"prompt": text, "image": path or list of paths, relative to the file}.

    Raises InputError that names the line.
    """
    out = []
    for number, line in json_lines.numbered(path):
        try:
            entry = json.loads(line)
            images = entry.get("image") or []
            images = [images] if isinstance(images, str) else images
            text = entry.get("prompt", entry.get("question"))
            if not isinstance(text, str) or not all(isinstance(i, str) for i in images):
                raise ValueError('needs "prompt": text, and may have "image": path')
            out.append(Prompt(text, tuple(path.parent / i for i in images)))
        except (ValueError, AttributeError) as e:
            raise InputError(f"line {number}: {e}", where=path, fix='write {"prompt": "..."} on every line') from e
    if not out:
        raise InputError("holds no prompt", where=path, fix='write {"prompt": "..."} on every line')
    return out


def measure(
    runner: Runner,
    prompts: list[Prompt],
    own: int = 16,
    max_new_tokens: int = 64,
    sensitivity_prompts: int = 16,
    seed: int = 0,
    what: str = "",
    progress: Callable[..., None] = lambda what, done=None, total=None: None,
) -> Calibration:
    """The calibration of `runner`'s checkpoint; `own` > 0 and no prompts: it continues random beginnings, sampled.

    Raises InputError for weights in another order than the checkpoint's, and when not a single token was generated.
    """
    bundle, shape = runner.bundle, runner.bundle.shape
    if runner.recipe.neurons.block > 1:
        raise InputError("its neurons are reordered", where=bundle.path, fix="calibrate a bundle with neurons.block 1")
    bundle.wait_verified()
    notes: dict[str, list[Note]] = {}  # on pictures, by their names
    answers = list(_answers(runner, prompts, own, max_new_tokens, seed, progress, notes))
    total = sum(len(a) for _, a in answers)
    if not total:
        raise InputError("the model answered nothing to every prompt", where="calibrate", fix="give other --data")

    watch = Runner(bundle, runner.backend.threads, runner.recipe, _watching(runner))
    energy, mean_z = (np.zeros((shape.layers, shape.ffn)) for _ in range(2))
    picked = set(np.random.default_rng(seed).permutation(total)[:PROFILE_TOKENS].tolist())
    profiles: list[list[np.ndarray]] = [[] for _ in range(shape.layers)]
    at = 0
    for i, (request, answer) in enumerate(answers):
        progress("watch the neurons", i, len(answers))
        outputs, _ = watch.backend.prefill(_with_answer(request, answer))
        rows = [n for n in range(len(answer)) if at + n in picked]
        for layer in range(shape.layers):
            z = outputs[f"z.{layer}"][0, request.tokens :].astype(np.float64)
            share = z * z / np.maximum((z * z).sum(1, keepdims=True), 1e-60)
            energy[layer] += share.sum(0)
            mean_z[layer] += z.sum(0)
            profiles[layer].append(share[rows].astype(np.float16))
        at += len(answer)
    watch.backend.drop("prefill")
    order = []
    for layer in range(shape.layers):
        progress("order the neurons: layer", layer + 1, shape.layers)
        order.append(cluster(np.concatenate(profiles[layer]).astype(np.float32)))
    energy, mean_z = energy / np.maximum(energy.sum(1, keepdims=True), 1e-60), mean_z / total
    down = [bundle.weights[names[2]] for names in core_row_names(bundle.family, shape.layers)]
    mean_y = [z @ rows.astype(np.float64) for z, rows in zip(mean_z, down, strict=True)]
    some = [a for a in answers if len(a[1])][:sensitivity_prompts]
    sensitivity = _sensitivity(runner, some, energy, progress)
    tokens = runner.recipe.tokens if runner.recipe.tokens.policy != "dense" else Recipe().tokens
    prune = prune_layers.measure(runner, some, tokens, divergences, progress)
    files = bundle.manifest["model"]["files"]
    about = {
        "checkpoint": checkpoint_id(files),
        "model": bundle.manifest["model"]["source"],
        "ran": {"data": what, "prompts": len(answers), "generated_tokens": total, "seed": seed}
        | {"max_new_tokens": max_new_tokens, "sensitivity_prompts": len(some)}
        | ({"notes": counted(notes, len(notes))} if any(notes.values()) else {})
        | {"answers": str(runner.rule()) if prompts else "sampled at temperature 1"}
        | {"token_policy": tokens.policy, "tokens": {k: getattr(tokens, k) for k in prune_layers.MATTER}},
        "versions": {n: version(n) for n in _LIBRARIES},
    }
    return Calibration(energy, mean_z, np.stack(mean_y), sensitivity, np.array(SHARES), np.stack(order), about, **prune)


def _answers(runner, prompts, own, limit, seed, progress, notes) -> Iterator[tuple[Request, np.ndarray]]:
    """Requests with the dense model's answers [T], greedy under the bundle's rule; drawn where there is no prompt to answer."""
    rng, shape = np.random.default_rng(seed), runner.bundle.shape
    if not prompts:
        words = np.setdiff1d(np.arange(shape.vocab), [shape.image_token, *shape.stop_ids])
        for i in range(own):
            progress("let the model write", i, own)
            request = runner.request(rng.choice(words, OWN_WORDS), Pictures())
            # Greedy text from a random beginning runs in circles.
            row = runner.prefill(request, Budget(dense=True)).row(limit=limit)
            row.choose = sampled(rng, frozenset(shape.stop_ids))
            yield request, _written(runner, row)
        return
    seen: dict[tuple[Path, ...], Pictures] = {}
    for i, prompt in enumerate(prompts):
        progress("let the model answer", i, len(prompts))
        if prompt.images not in seen:
            pictures = [given(prompt.open(p), str(p)) for p in prompt.images]
            seen = {prompt.images: runner.see(pictures)}
            notes |= {str(p): runner.notes_on(shown) for p, shown in zip(prompt.images, pictures, strict=True)}
        request = runner.ask(prompt.text, seen[prompt.images])
        prefilled = runner.prefill(request, Budget(dense=True))
        yield request, _written(runner, runner.answering(prefilled, runner.rule(), limit))


def _written(runner: Runner, row: Row) -> np.ndarray:
    """[T] int64: the answer of a row."""
    return np.array([token for _, token in decode(runner.backend, [row])], np.int64)


def _watching(runner: Runner) -> Callable[[str], Path | onnx.ModelProto]:
    """Graphs of a bundle, its dense prefill reporting z.{layer} [B,S,F] as `prefill`."""
    bundle = runner.bundle

    def graph(name: str) -> Path | onnx.ModelProto:
        if name != "prefill":
            return bundle.graph(name)
        dense = onnx.load(bundle.graph("prefill_dense"), load_external_data=False)
        return report_activations(dense, bundle.family, bundle.shape)

    return graph


def _with_answer(request: Request, answer: np.ndarray) -> dict[str, np.ndarray]:
    """Prefill feeds of prompt + answer, the answer at the positions that decode gives it."""
    return prefill_feeds(request.extended(answer.tolist()))


def _sensitivity(runner: Runner, answers: list, energy: np.ndarray, progress: Callable[..., None]) -> np.ndarray:
    """[L,P]: mean KL per token when one layer computes the neurons that `glass` ranks first; energy [L,F]: its prior."""
    bundle, shape = runner.bundle, runner.bundle.shape
    judge = with_policies(runner, Recipe().replace(neurons__policy="griffin", tokens__policy="dense"))
    weighed = Recipe().replace(neurons__policy="griffin", neurons__row_norm=True)
    down = neuron_constants(weighed, bundle.weights, bundle.family, shape, None)["row"]
    kl, tokens, whole = np.zeros((shape.layers, len(SHARES))), 0, CoreSet.whole(shape)
    for i, (request, answer) in enumerate(answers):
        answer = answer[:SENSITIVITY_TOKENS]
        prefilled = judge.prefill(request, Budget())
        expected = teacher_forced(judge.backend, prefilled.row(whole), answer.tolist())[1:]
        tokens += len(answer)
        measured = prefilled.measured["core_scores"][:, 0]
        of_prompt = measured / measured.sum(-1, keepdims=True)
        scores = ((of_prompt + energy) * down)[:, None].astype(np.float32)
        for p, share in enumerate(SHARES):
            chosen = select_core_neurons(scores, neuron_count(share, shape.ffn))
            for layer in range(shape.layers):
                progress("measure each layer's sensitivity", i * shape.layers + layer, len(answers) * shape.layers)
                row = prefilled.row(whole.with_layer(layer, chosen[layer, 0]))
                found = teacher_forced(judge.backend, row, answer.tolist())[1:]
                kl[layer, p] += divergences(expected, found).sum()
    return kl / max(1, tokens)


def task_prompts(task: ModuleType, count: int, seed: int) -> list[Prompt]:
    """Calibration prompts of an eval task, from its training half. Raises InputError if it has none."""
    if not hasattr(task, "calibration_prompts"):
        name = task.__name__.rpartition(".")[2]
        raise InputError(f"the task {name} has no training questions", where="--data", fix="give a .jsonl file")
    return [Prompt(text, (image,), task.open_picture) for text, image in task.calibration_prompts(count, seed)]


def prompts_of(data: str | None, model: str, count: int, seed: int) -> tuple[list[Prompt], str]:
    """The prompts that `data` names and how to call them: a .jsonl file, an eval task, or None (the model's default).

    The demo models are asked their own task; any other model writes from random beginnings.
    """
    if data is None:
        data = OWN_TASKS.get(model, "own text")
    if data == "own text":
        return [], data
    name = data.replace("-", "_")
    if name in by_name.names_in("cm_export.evals.tasks"):
        return task_prompts(by_name.load("cm_export.evals.tasks", name, "task"), count, seed), f"{data}, training half"
    path = Path(data)
    if not path.is_file():
        known = [n.replace("_", "-") for n in by_name.names_in("cm_export.evals.tasks")]
        raise InputError(
            "no such file or task", where=f"--data {data}", fix=by_name.nearest(data, ["own text", *known])
        )
    return read_prompts(path)[:count], path.name
