"""Measure thresholds: what the channels of every product weigh while the dense model writes, and what leaving some out costs.

prompt -> dense greedy (or drawn) answer a_1..a_T -> one dense read of both that reports what every product reads
          weights of channels |x_i| norm_i over all tokens -> a threshold for each share
                                                  -> one read with one site at half: KL to dense, its sensitivity
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from ..backends.onnxruntime.backend import Rows
from ..base import dims, environment
from ..base.errors import InputError
from ..base.metrics import divergences
from ..bundle.names import core_row_names
from ..bundle.predictor import row_norms
from ..bundle.thresholds import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT, SIDES, Thresholds
from ..evals.other_policies import with_policies
from ..evals.watching import watching
from ..host.core_set import CoreSet
from ..host.decode import Reader, Row
from ..host.request import Request
from ..host.runner import Budget, Prefilled, Runner
from ..recipe.recipe import LEAST_ACTIVE, Recipe
from ..surgery.edit import Edit
from ..surgery.keep_active import norms_of
from ..surgery.products import head_product, layer_products
from ..surgery.report_channels import report_channels

LEVELS = np.round(np.arange(LEAST_ACTIVE, 1.001, 0.05), 3)
SOME = 1024  # rows of x that are kept of each site
SENSITIVITY_PROMPTS = 16  # at most, whose answers the sites are measured on
HALF = 0.5  # of its channels, at which a site's sensitivity is measured
Answer = tuple[Request, np.ndarray]


@dataclass(frozen=True)
class Watched:
    """What every site reads: the weights of its channels in answers, and some rows of x in prompts and answers."""

    weights: list[np.ndarray]  # [T*C] float32, |x| norm
    some: list[np.ndarray]  # [up to SOME,C] float32
    sizes: np.ndarray  # [T] weights that a site's product reads


def watch(runner: Runner, answers: Sequence[Answer], progress: Callable[..., None]) -> Watched:
    """The dense model reads prompts with the answers that it gave to them. Raises InputError for answers without a token."""
    answers = [(request, answer) for request, answer in answers if len(answer)]
    if not answers:
        raise InputError("the model answered nothing", where="thresholds", fix="give other prompts")
    norms, sizes = norms_and_sizes(runner)
    # As a later turn, which reads many tokens at once, its dense decode reports what every site reads.
    watcher, rng = watching(runner, "turn", "decode_dense", report_channels), np.random.default_rng(0)
    each = max(1, SOME // (2 * len(answers)))  # half from prompts, half from answers
    weights: list[list[np.ndarray]] = [[] for _ in norms]
    some: list[list[np.ndarray]] = [[] for _ in norms]
    for i, (request, answer) in enumerate(answers):
        progress("watch what products read", i, len(answers))
        parts = np.arange(request.tokens), np.arange(request.tokens, request.tokens + len(answer))
        rows = np.concatenate(
            [[0], *(rng.permutation(part)[:each] for part in parts)]
        )  # the first token is unlike others
        for site, x in enumerate(_channels(watcher, request.extended(answer.tolist()))):
            weights[site].append((np.abs(x[request.tokens :]) * norms[site]).astype(np.float32).ravel())
            some[site].append(x[rows])
    watcher.backend.drop("turn")
    return Watched([np.concatenate(w) for w in weights], [np.concatenate(x) for x in some], sizes)


def measure(
    runner: Runner,
    answers: Sequence[Answer],
    watched: Watched,
    sensitivity_tokens: int,
    progress: Callable[..., None],
    seconds: float = float("inf"),
) -> Thresholds:
    """Thresholds of a bundle's model on answers that its dense form has written.

    `sensitivity_tokens`: of all answers together, on which each site is measured. Where that would take longer than
    `seconds` of computing, on fewer; where not even one answer can be read per site in that time, every site counts the same.
    """
    thresholds = np.stack([_quantiles(weights) for weights in watched.weights])
    even = Thresholds(LEVELS, thresholds, np.ones(len(thresholds), np.float32), watched.sizes)
    read = [(runner.prefill(r, Budget(dense=True)), a) for r, a in answers[:SENSITIVITY_PROMPTS] if len(a)]
    runner.backend.drop("prefill_dense")
    return replace(even, sensitivity=_sensitivity(runner, even, read, sensitivity_tokens, progress, seconds))


def _quantiles(weights: np.ndarray) -> np.ndarray:
    """[P] float32: the threshold that a share LEVELS[p] of these weights is not below; 0 for all of them."""
    out = np.quantile(weights, 1 - LEVELS).astype(np.float32)
    out[-1] = 0
    return np.minimum.accumulate(out)


def norms_and_sizes(runner: Runner) -> tuple[list[np.ndarray], np.ndarray]:
    """For each site the norms [C] of its channels, and the number of weights that it reads."""
    bundle, shape = runner.bundle, runner.bundle.shape
    edit = Edit(onnx.load(bundle.graph("decode_dense"), load_external_data=False))
    norm, file = norms_of(bundle.weights), bundle.weights
    norms: list[np.ndarray] = [np.zeros(0)] * (SIDES * shape.layers + 1)
    sizes = np.zeros(len(norms), np.float32)

    def note(site: int, found: np.ndarray, *names: str) -> None:
        norms[site], sizes[site] = found, sum(file[name].size for name in names)

    for layer, (gate, up, down) in enumerate(core_row_names(bundle.family, shape.layers)):
        note(SIDES * layer + FFN_IN, norm([gate, up]), gate, up)
        note(SIDES * layer + FFN_OUT, row_norms(file[down]), down)
    for own in layer_products(edit, bundle.family, shape.layers):
        into = [p.weight.name for p in own.into]
        note(SIDES * own.layer + ATTENTION_IN, norm(into), *into)
        note(SIDES * own.layer + ATTENTION_OUT, norm([own.out.weight.name]), own.out.weight.name)
    head = head_product(edit).weight.name
    note(-1, norm([head]), head)
    return norms, sizes


def _channels(watcher: Runner, context: Request) -> list[np.ndarray]:
    """What every site reads [T,C] at the tokens of a context, the dense model reading them at once."""
    shape = watcher.bundle.shape
    none = np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)
    feeds = {
        "inputs_embeds": context.inputs_embeds,
        "position_ids": context.position_ids,
        "attention_mask": np.ones((1, context.tokens), np.int64),
    }
    found, _ = watcher.backend.turn(feeds, Rows.of(dict.fromkeys(dims.cache_names(shape.layers, "past"), none)))
    return [found[f"site.{site}"][0] for site in range(SIDES * shape.layers + 1)]


def _sensitivity(
    runner: Runner,
    table: Thresholds,
    read: Sequence[tuple[Prefilled, np.ndarray]],
    tokens: int,
    progress: Callable[..., None],
    seconds: float,
) -> np.ndarray:
    """[T] float32: mean KL per token with one site at HALF. All ones where not even one answer can be read in time."""
    shape, sites = runner.bundle.shape, len(table.sizes)
    recipe = Recipe().replace(neurons__policy="active", tokens__policy="dense")
    backend = with_policies(runner, recipe).backend
    at_half, whole = table.at(np.full(sites, HALF)), np.zeros(sites, np.float32)
    counts = np.full(shape.layers, shape.ffn, np.int64)

    def logits(prefilled: Prefilled, ids: list[int], thresholds: np.ndarray) -> np.ndarray:
        core = CoreSet(None, counts, shape.ffn, thresholds=thresholds)
        row = Row(prefilled.request, core, prefilled.cache, prefilled.logits[0], "decode")
        Reader(backend).read([row], [ids])
        return np.atleast_2d(row.logits)

    kl, counted, spent = np.zeros(sites), 0, 0.0
    for i, (prefilled, answer) in enumerate(read):
        ids = answer[: max(0, tokens - counted)].tolist()
        if not ids:
            break
        if not i:
            logits(prefilled, ids, whole)  # makes the session
        started = environment.worked(runner.backend.threads)
        expected = logits(prefilled, ids, whole)
        one = environment.worked(runner.backend.threads) - started
        if spent + one * sites > seconds:
            break
        for site in range(sites):
            progress("measure what each product can leave out", i * sites + site, len(read) * sites)
            one_alone = np.where(np.arange(sites) == site, at_half, whole).astype(np.float32)
            kl[site] += divergences(expected, logits(prefilled, ids, one_alone)).sum()
        counted += len(ids)
        spent += environment.worked(runner.backend.threads) - started
    backend.drop("decode")
    return np.asarray(kl / counted if counted else np.ones(sites), np.float32)
