"""Measure a calibration: the bundle's dense model answers prompts, and its FFNs are watched while it writes.

prompt -> dense greedy answer a_1..a_T -> one prefill over prompt + answer, z of every layer at the answer's tokens
                                       -> decode of the same answer with one layer sparse at a time: KL to dense
                                       -> the same answer after a cut of the image tokens at each layer (prune_layers.py)

Only generated tokens count: an offline prior from prompts says little about decode (GLASS, arXiv 2508.14302, section 3).
"""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from ..base.core_index import neuron_count, select_core_neurons
from ..base.errors import InputError
from ..base.metrics import divergences
from ..bundle.calibration import Calibration, checkpoint_id
from ..bundle.names import core_row_names
from ..bundle.phrases import Phrases
from ..evals.other_policies import with_policies
from ..evals.watching import watching
from ..host.core_set import CoreSet
from ..host.decode import teacher_forced
from ..host.picture_notes import Note, counted
from ..host.request import Request, prefill_feeds
from ..host.runner import Budget, Runner
from ..recipe.recipe import Recipe
from ..surgery.neuron_constants import neuron_constants
from ..surgery.report_activations import report_activations
from . import prune_layers, thresholds
from .answers import Prompt, Texts, answering, asking, own_text
from .cluster import cluster

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)  # of one layer's neurons, at which its sensitivity is measured
PROFILE_TOKENS = 512  # tokens whose energies are kept for clustering: [512,F] float16 per layer
SENSITIVITY_TOKENS = 64  # of one answer, at most
ACTIVE_TOKENS = 256  # of all answers, on which each product's sensitivity is measured for thresholds
_LIBRARIES = ("numpy", "onnxruntime")


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
    asked = asking(runner, prompts, progress, notes) if prompts else own_text(runner, own, seed, progress)
    texts: Texts = []
    answers = list(answering(runner, asked, max_new_tokens, drawn=not prompts, seed=seed, texts=texts))
    total = sum(len(a) for _, a in answers)
    if not total:
        raise InputError("the model answered nothing to every prompt", where="calibrate", fix="give other --data")

    watch = watching(runner, "prefill", "prefill_dense", report_activations)
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
    watched = thresholds.watch(runner, answers, progress)
    active = thresholds.measure(runner, answers, watched, ACTIVE_TOKENS, progress)
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
    return Calibration(
        energy, mean_z, np.stack(mean_y), sensitivity, np.array(SHARES), np.stack(order), about, **prune, active=active,
        phrases=Phrases.of(texts) if texts else None,
    )  # fmt: skip


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
