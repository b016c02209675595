"""Recipes that a program tries in the place of another: other policies and budgets, and the random control of a size.

eval, calibrate and tune:  recipe -> varied(recipe, tokens__policy="value", ...)       recipe -> at_random(recipe, .6, .25)
"""

import dataclasses
from typing import Any

from .recipe import Recipe


def varied(recipe: Recipe, **overrides: Any) -> Recipe:
    """`recipe.replace` for a program that tries other policies and budgets: keys that no longer fit give way.

    A first cut goes with the second one, and leaves at least what that one keeps; a decode that chooses for itself
    has no fill. Raises InputError for what still cannot hold.
    """
    n, t = (
        dataclasses.replace(
            getattr(recipe, section),
            **{k.partition("__")[2]: v for k, v in overrides.items() if v is not None and k.startswith(section)},
        )
        for section in ("neurons", "tokens")
    )
    if t.first != "none":
        least = t.share if t.budget == "share" else t.min_share if t.budget == "knee" else 0.0
        overrides["tokens__first_share"] = max(t.first_share, least)
        overrides["tokens__first"] = "none" if t.policy == "dense" else t.first
    if n.in_decode or n.by_threshold:
        overrides["neurons__fill"] = "none"
    if n.by_threshold:
        overrides |= {"neurons__block": 1, "neurons__layers": "uniform"}
    elif n.policy != "dense" and recipe.weights.of("ffn") < 32:  # rows of a set are gathered from float32 weights
        overrides["weights__ffn"] = "fp32"
    return recipe.replace(**overrides)


def at_random(recipe: Recipe, neuron_share: float, token_share: float) -> Recipe:
    """The control: random choices of these sizes, single neurons from the whole prompt; what is whole stays whole.

    Without a mean in place of dropped neurons: a random set is better off without (docs/neurons.md).
    """
    values: dict[str, Any] = {"neurons__fill": "none", "tokens__first": "none"}
    if recipe.weights.of("ffn") < 32 and recipe.neurons.policy != "dense":
        values["weights__ffn"] = "fp32"
    if recipe.neurons.policy != "dense":
        values |= {"neurons__policy": "random", "neurons__share": neuron_share, "neurons__block": 1}
    if recipe.tokens.policy != "dense":
        values |= {"tokens__policy": "random", "tokens__share": token_share, "tokens__budget": "share"}
    return recipe.replace(**values)
