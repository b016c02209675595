"""Proofs that pictures and prompts are read, and answers written, as stock transformers does.

vision         every output of the vision graph, pictures of `sample` in one run and one by one
answers        prompts with pictures and clips of `sample`: prefill, cache and eight greedy tokens
two pictures   the same of two pictures of unequal size in one prompt, as `probes` makes them, apart and side by side
text only      the same of words alone
batch          three unequal requests that decode together, each as it answers alone
later          a second question over the cache of the first, at full budget and dense
"""

from typing import Any

import numpy as np

from ..backends.onnxruntime.cache import own
from ..base.errors import InputError
from ..families import Arrays, Picture
from ..host.decode import Row, decode, greedy, recorded
from ..host.runner import Budget, Prefilled, Runner
from ..recipe.recipe import Recipe
from .proof import Found, Pairs, compare
from .subject import Prompt, Stock, Subject

STEPS = 8
LISTED = "attention"  # a token policy that can leave the cache whole
DENSE = Recipe().replace(neurons__policy="dense", tokens__policy="dense")


def vision(of: Subject) -> Found:
    import torch

    rng, tower, pairs = np.random.default_rng(1), of.sees, {}
    backend = of.backend(DENSE)
    asked = [*([p] for p in tower.probes(rng)), *(tower.sample(rng) for _ in range(4))]
    asked = [[p for p in pictures if not p.layout.is_clip] for pictures in asked]  # clips are in `answers`
    asked = [pictures for pictures in asked if pictures]
    for number, pictures in enumerate(asked):
        given = {n: torch.from_numpy(v) for n, v in tower.stock(pictures, np.ones(_tokens(pictures), bool)).items()}
        with torch.no_grad():
            expected = {n: v.numpy() for n, v in tower.features(of.model, given).items()}
        together = backend.vision(tower.feeds(pictures))
        alone = [backend.vision(tower.feeds([p])) for p in pictures]
        for port in tower.outputs:
            pairs[f"{port.name} of pictures {number}"] = together[port.name], expected[port.name]
            one_by_one = np.concatenate([a[port.name] for a in alone])
            pairs[f"{port.name} of pictures {number}, one by one"] = one_by_one, expected[port.name]
    return compare(pairs, f"{sum(map(len, asked))} pictures in {len(asked)} runs")


def _tokens(pictures: list[Picture]) -> int:
    return sum(p.tokens for p in pictures)


def answers(of: Subject) -> Found:
    rng = np.random.default_rng(2)
    return _answered(of, [of.prompt(of.sees.sample(rng), rng, words) for words in (1, 4)])


def two_pictures(of: Subject) -> Found:
    rng = np.random.default_rng(3)
    pictures = of.sees.probes(rng)
    if len(pictures) != 2:
        raise InputError(f"probes(rng) makes {len(pictures)} pictures, two are asked for", where="Tower.probes")
    touching = of.prompt(pictures[::-1], rng, between=0 if of.sees.may_touch else 1)
    return _answered(of, [of.prompt(pictures, rng, 2), touching])


def text_only(of: Subject) -> Found:
    rng = np.random.default_rng(4)
    return _answered(of, [of.prompt([], rng, words) for words in (2, 9)])


def _answered(of: Subject, prompts: list[Prompt]) -> Found:
    runner, same = of.runner(DENSE), {}
    pairs: Pairs = {}
    for number, prompt in enumerate(prompts):
        ours = runner.prefill(of.request(runner, prompt), Budget(dense=True))
        theirs, rows = of.stock(prompt, STEPS), cache_of(ours)
        ids, logits = written(runner, ours)
        pairs |= paired(f"prompt {number}", rows, logits, theirs)
        same[f"tokens after prompt {number}"] = ids, theirs.ids
    sizes = " and ".join(str(len(p.ids)) for p in prompts)
    return compare(pairs, f"{STEPS} greedy tokens after prompts of {sizes}", same)


def written(runner: Runner, prefilled: Prefilled, steps: int = STEPS) -> tuple[list[int], np.ndarray]:
    """Greedy ids, and the logits [N,V] before each of them."""
    logits: list[np.ndarray] = []
    row = prefilled.row(choose=recorded(greedy(), logits), limit=steps)
    return [token for _, token in decode(runner.backend, [row])], np.stack(logits)


def paired(what: str, rows: Arrays, logits: np.ndarray, theirs: Stock, kept: np.ndarray | None = None) -> Pairs:
    """Logits of every step, and the `rows` that the prefill left in the cache; `kept`: which of the prompt's they are."""
    pairs = {f"logits of {what}, token {i}": (a, b) for i, (a, b) in enumerate(zip(logits, theirs.logits, strict=True))}
    for name, value in rows.items():
        pairs[f"{name} of {what}"] = value, theirs.cache[name] if kept is None else theirs.cache[name][:, kept]
    return pairs


def cache_of(prefilled: Prefilled) -> Arrays:
    """Keys and values [Hk,T,d] of a prompt, before anything is read after it."""
    return {name: value[0].copy() for name, value in own(prefilled.cache).arrays().items()}


def batch(of: Subject) -> Found:
    rng = np.random.default_rng(5)
    shown = [of.sees.sample(rng), of.sees.probes(rng)[:1], []] if of.tower else [[], [], []]
    runner = of.runner(recipe_of(of))
    prompts = [of.prompt(pictures, rng, words) for pictures, words in zip(shown, (2, 5, 9), strict=True)]
    requests = [of.request(runner, prompt) for prompt in prompts]

    def rows() -> list[tuple[Row, list[np.ndarray]]]:
        out = []
        for request, share in zip(requests, (0.3, 0.6, 1.0), strict=True):
            kept: list[np.ndarray] = []
            budget = Budget(neuron_share=share, token_share=share if of.tower else None)
            row = runner.prefill(request, budget).row(choose=recorded(greedy(), kept), limit=STEPS)
            out.append((row, kept))
        return out

    alone, together = rows(), rows()
    for row, _ in alone:
        for _ in decode(runner.backend, [row]):
            pass
    for _ in decode(runner.backend, [row for row, _ in together]):
        pass
    pairs, same = {}, {}
    for number, ((one, apart), (row, beside)) in enumerate(zip(alone, together, strict=True)):
        pairs[f"logits of request {number}"] = np.stack(beside), np.stack(apart)
        same[f"tokens of request {number} beside others"] = row.ids, one.ids
    sizes = ", ".join(str(len(p.ids)) for p in prompts)
    return compare(pairs, f"prompts of {sizes} tokens", same)


def later(of: Subject) -> Found:
    """Besides, the answer that is written then, which must be that of transformers to the whole conversation."""
    rng, same = np.random.default_rng(7), {}
    pairs: Pairs = {}
    runner = of.runner(recipe_of(of, tokens__cache="index", tokens__policy=LISTED))
    first = of.prompt(of.sees.sample(rng) if of.tower else [], rng)
    said = of.prompt([], rng, 7).ids.tolist()
    whole = Prompt(first.pictures, np.append(first.ids, said), np.append(first.is_image, [False] * len(said)))
    theirs = of.stock(whole, STEPS)
    full = Budget(neuron_share=1.0, token_share=1.0 if of.shape.sees else None)
    for name, budget in {"full budget": full, "dense": Budget(dense=True)}.items():
        context = runner.prefill(of.request(runner, first), budget).then(said, 3)
        rows = cache_of(context)
        ids, logits = written(runner, context)
        pairs |= paired(f"the later question, {name}", rows, logits, theirs)
        same[f"tokens after the later question, {name}"] = ids, theirs.ids
    return compare(pairs, f"{len(said)} tokens after a prompt of {len(first.ids)}", same)


def recipe_of(of: Subject, **fields: Any) -> Recipe:
    """Neurons counted by griffin and tokens cut at the earliest layer where that is possible; `fields` of models that see."""
    if not of.shape.sees:
        return Recipe().replace(neurons__policy="griffin", tokens__policy="dense")
    first = max(1, of.shape.whole_layers)
    return Recipe().replace(**{"neurons__policy": "griffin", "tokens__prune_layer": first} | fields)
