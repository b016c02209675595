"""Settings that somebody made and nothing reads, so that none is accepted in silence.

[neurons] policy = "griffin", rho = 0.3   ->   "neurons.rho = 0.3 is not read by policy 'griffin'"
"""

import dataclasses

from . import facts
from .recipe import Recipe

_NOTHING_LEFT_OUT = "with policy 'dense', which leaves nothing out"


def unread(recipe: Recipe) -> list[str]:
    """A sentence for each setting that differs from its default and that no rule of this recipe reads."""
    return [f"{key} = {value!r} is not read {why}" for key, why in _reasons(recipe) if (value := _made(recipe, key))]


def _reasons(recipe: Recipe) -> list[tuple[str, str]]:
    """(key, why nothing reads it) of every key that this recipe's policies and budget do not look at."""
    n, t = recipe.neurons, recipe.tokens
    neurons, tokens = facts.neuron_policy(n.policy), facts.token_policy(t.policy)
    wanted = {
        "neurons.rho": "rho" in neurons.attributes,
        "neurons.mix": "mix" in neurons.attributes,
        "neurons.row_norm": "row" in neurons.wires,
        "tokens.rho": "rho" in tokens.attributes,
        "tokens.beta": "beta" in tokens.attributes,
        "tokens.voters": "vote" in tokens.wires,
    }
    votes = "weight" in neurons.wires or n.fill == "prompt"
    wanted |= {f"neurons.{key}": votes for key in ("voters", "counted", "image_weight")}
    found = [
        (key, f"by policy {getattr(recipe, key.split('.')[0]).policy!r}") for key, read in wanted.items() if not read
    ]
    if recipe.backend != "onnxruntime":
        found.append(("weights.cache", f"by {recipe.backend}, whose engines' cache is as engine.precision says"))
    elif not (recipe.weights.packs or recipe.weights.is_open):
        found.append(("weights.cache", "with float32 weights, whose steps read a float32 cache"))
    if n.policy == "dense":
        found += [(f"neurons.{key}", _NOTHING_LEFT_OUT) for key in ("share", "fill", "layers")]
    if t.policy == "dense":
        keys = ("budget", "share", "count", "min_share", "max_share", "knee_confidence", "quota", "layers", "cache")
        return found + [(f"tokens.{key}", _NOTHING_LEFT_OUT) for key in keys]
    budgets = {"count": "count", "share": "share", "min_share": "knee", "max_share": "knee", "knee_confidence": "knee"}
    for key, budget in budgets.items():
        if t.budget != budget and (key, t.budget) != ("share", "knee"):  # what is kept where no knee is found
            found.append((f"tokens.{key}", f"with tokens.budget = {t.budget!r}"))
    if t.first == "none":
        found.append(("tokens.first_share", "without tokens.first"))
    return found


def _made(recipe: Recipe, key: str) -> object:
    """The value of a key that differs from its default; None of one that does not."""
    table, name = key.split(".")
    values = getattr(recipe, table)
    default = next(field.default for field in dataclasses.fields(values) if field.name == name)
    value: object = getattr(values, name)
    return None if value == default else value
