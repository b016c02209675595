"""Proofs that the sparse graphs mean what they say.

full budget   sparse graphs that keep every token and every neuron, and the dense ones: logits, cache, eight steps
cut           tokens cut after a layer by some policies, and stock transformers with these tokens masked from there on
positions     eight steps after a cut, or over a list of the rows that stay, and stock transformers with the others masked:
              its positions are the prompt's own
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base import by_name
from ..base.core_index import image_token_count
from ..base.errors import GateFailed, InputError
from ..host.runner import Budget
from ..recipe import facts
from .answers import LISTED, STEPS, cache_of, paired, recipe_of, written
from .proof import Found, Pairs, compare
from .subject import Prompt, Stock, Subject

SHARE = 0.4  # of the image tokens, which stay


def full_budget(of: Subject) -> Found:
    """One recipe that cuts, and one that lists rows."""
    rng, same = np.random.default_rng(6), {}
    pairs: Pairs = {}
    budget = Budget(neuron_share=1.0, token_share=1.0 if of.shape.sees else None)
    shown = [of.sees.sample(rng), of.sees.probes(rng), []] if of.tower else [[], []]
    for cache in ("cut", "index") if of.shape.sees else ("cut",):
        runner = of.runner(recipe_of(of, tokens__cache=cache, tokens__policy=LISTED))
        for number, pictures in enumerate(shown):
            request = of.request(runner, of.prompt(pictures, rng))
            full, dense = (runner.prefill(request, b) for b in (budget, Budget(dense=True)))
            held = cache_of(dense)  # before anything is written behind it
            expected, theirs = written(runner, dense)
            there = cache_of(full)
            ids, ours = written(runner, full)
            pairs |= paired(f"prompt {number}, cache {cache}", there, ours, Stock(expected, theirs, held))
            same[f"tokens after prompt {number}, cache {cache}"] = ids, expected
    return compare(pairs, f"{len(pairs)} values of {len(same)} answers", same)


@dataclass(frozen=True)
class _Cut:
    """One cut prefill and what stock transformers says to the same tokens."""

    what: str
    pairs: Pairs
    ids: tuple[list[int], list[int]]


def cut(of: Subject) -> Found:
    every = _policies()
    chosen = [every[(of.number + i * 3) % len(every)] for i in range(3)]
    # A cut before the first layer that keeps all leaves what the one after it does as it is.
    before = {} if of.shape.whole_layers else {"first": "spread", "first_share": 1.0}
    ways: tuple[dict[str, Any], ...] = ({}, {"quota": "each"}, before)
    cuts = [_cut(of, i, 1, policy=p, **how) for i, (p, how) in enumerate(zip(chosen, ways, strict=True))]
    return compare({n: p for c in cuts for n, p in c.pairs.items()}, "; ".join(c.what for c in cuts))


def positions(of: Subject) -> Found:
    every = _policies()
    cuts = [
        _cut(of, 3, STEPS, policy=every[of.number % len(every)]),
        _cut(of, 4, STEPS, policy=LISTED, cache="index"),
    ]
    same = {f"tokens after {c.what}": c.ids for c in cuts}
    return compare({n: p for c in cuts for n, p in c.pairs.items()}, "; ".join(c.what for c in cuts), same)


def _policies() -> list[str]:
    return [name for name in by_name.names_in(facts.TOKENS) if facts.token_policy(name).scores]


def _cut(of: Subject, seed: int, steps: int, **fields: Any) -> _Cut:
    """Raises GateFailed where other tokens than so many of the pictures' leave."""
    rng, share = np.random.default_rng([of.number, seed]), Budget(neuron_share=1.0, token_share=SHARE)
    first = max(1, of.shape.whole_layers)
    if first >= of.shape.layers:
        raise InputError(f"all {of.shape.layers} layers must see every token: none is left to cut before")
    layer = first + (of.number + seed) % (of.shape.layers - first)
    runner = of.runner(recipe_of(of, **{f"tokens__{n}": v for n, v in (fields | {"prune_layer": layer}).items()}))
    tokens, prompt = runner.recipe.tokens, _several(of, rng)
    request = of.request(runner, prompt)
    ours = runner.prefill(request, share)
    kept = ours.kept_tokens[0]
    gone = np.setdiff1d(np.arange(len(prompt.ids)), kept)
    what = f"{tokens.policy}, quota {tokens.quota}, after layer {layer} of {of.shape.layers}, cache {tokens.cache}"
    _check_counts(prompt, request.picture[0], gone, tokens.quota == "each", what)
    whole = tokens.cache == "index"  # rows stay, and only the steps leave them out
    with _hidden(of, gone, of.shape.layers if whole else layer):
        theirs = of.stock(prompt, steps)
    rows = cache_of(ours)
    ids, logits = written(runner, ours, steps)
    pairs = paired(what, rows, logits, theirs, None if whole else kept)
    return _Cut(f"{what}: {len(kept)} of {len(prompt.ids)} tokens", pairs, (ids, theirs.ids))


def _check_counts(prompt: Prompt, picture: np.ndarray, gone: np.ndarray, each: bool, what: str) -> None:
    """Raises GateFailed unless as many image tokens leave as the share says, of every picture or of all, and no text."""
    sizes = [p.tokens for p in prompt.pictures]
    found = [int((picture[gone] == i).sum()) for i in range(len(sizes))]
    sizes, found = (sizes, found) if each else ([sum(sizes)], [sum(found)])
    expected = [n - image_token_count(SHARE, n) for n in sizes]
    if found != expected or sum(found) != len(gone) or not sum(found):
        more = f" and {len(gone) - sum(found)} words" if len(gone) > sum(found) else ""
        raise GateFailed(f"{found} image tokens{more} are cut, expected {expected}", where=what)


def _several(of: Subject, rng: np.random.Generator) -> Prompt:
    """A prompt of whose image tokens some can be cut."""
    for _ in range(20):
        prompt = of.prompt(of.sees.sample(rng), rng, between=0 if of.sees.may_touch else 1)
        if prompt.is_image.sum() > 2:
            return prompt
    return of.prompt(of.sees.probes(rng) * 2, rng)


@contextlib.contextmanager
def _hidden(of: Subject, gone: np.ndarray, first: int) -> Iterator[None]:
    """Stock layers from `first` on read no key of the columns `gone` of the prompt, and later tokens none of them anywhere."""
    import torch

    def before(index: int, args: Any, kwargs: Any) -> Any:
        past = kwargs["past_key_values"].get_seq_length(index)
        new = (args[0] if args else kwargs["hidden_states"]).shape[1]
        allowed = torch.ones(new, past + new, dtype=torch.bool).tril(past)
        if past or index >= first:
            own = torch.eye(new, past + new, dtype=torch.bool) if not past else False  # nobody reads what such a row is
            allowed[:, torch.from_numpy(gone)] = False
            allowed |= own
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None, None]}

    layers = of.model.get_decoder().layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, a, k, i=i: before(i, a, k), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
