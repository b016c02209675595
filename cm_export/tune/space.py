"""What a search may try on one bundle: policies that it can run, their budgets, where the cut is, who votes.

neurons -> neuron_percent, neuron_voters, block        tokens -> token_percent, token_voters, prune_layer
A policy that prunes nothing (`dense`) has none of the numbers behind it, so they are only asked where they mean something.
"""

from dataclasses import asdict, dataclass
from typing import Any

from ..base import by_name
from ..base.errors import InputError
from ..bundle.bundle import Bundle
from ..recipe import facts
from ..recipe.recipe import BLOCKS, LEAST_ACTIVE, VOTERS, Recipe
from ..recipe.vary import varied
from ..surgery import pipeline

# Lowest, highest and step of both shares: a few hundred questions cannot tell finer steps apart.
PERCENT = (5, 95, 5)
# The latest cut that is tried: a cut takes tokens out of every layer's cache, also where layers before it have read them.
DEEPEST = 6
# Where a search starts: percent of (neurons, image tokens) under the bundle's own policies; None: all of them.
CORNERS = ((90, 75), (70, 50), (50, 35), (60, None), (None, 50))


@dataclass(frozen=True)
class Space:
    """The choices of every dimension; what is not among them stays as in `base`, the bundle's own recipe."""

    base: Recipe
    neurons: tuple[str, ...]
    tokens: tuple[str, ...]
    blocks: tuple[int, ...]
    prune_layers: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values: two studies agree when these do."""
        return asdict(self) | {"base": self.base.to_dict(), "percent": PERCENT}


def of_bundle(bundle: Bundle, base: Recipe) -> Space:
    """What may be tried on this bundle: policies that pass the checks of recipe and graphs, no random ones. Raises InputError."""
    neurons = tuple(
        n
        for n in by_name.names_in(facts.NEURONS)
        if n != "random"
        and (bundle.thresholds is not None or not facts.neuron_policy(n).by_threshold)
        and _runs(base, bundle, neurons__policy=n)
    )
    last = min(bundle.shape.layers - 1, DEEPEST)
    tokens = tuple(
        t
        for t in by_name.names_in(facts.TOKENS)
        if t != "random"
        and (last or not _prunes(t))
        and _runs(base, bundle, tokens__policy=t, tokens__budget="share", tokens__prune_layer=1)
    )
    # In a bundle that was built in blocks, neurons that are active together lie side by side in the weight file. Graphs
    # that are rewritten in memory cannot reorder weights, so blocks are only tried in such a bundle.
    blocks = tuple(b for b in BLOCKS if bundle.shape.ffn % b == 0) if base.neurons.block > 1 else (1,)
    return Space(base, neurons, tokens, blocks, last)


def recipe_of(trial: Any, space: Space) -> Recipe:
    """The recipe of an Optuna trial."""
    values: dict[str, Any] = {"neurons__policy": trial.suggest_categorical("neurons", space.neurons)}
    if _prunes(values["neurons__policy"]):
        values["neurons__share"] = trial.suggest_int("neuron_percent", *PERCENT[:2], step=PERCENT[2]) / 100
        if facts.neuron_policy(values["neurons__policy"]).by_threshold:
            values["neurons__share"] = max(LEAST_ACTIVE, values["neurons__share"])
        if "weight" in facts.neuron_policy(values["neurons__policy"]).wires:
            values["neurons__voters"] = trial.suggest_categorical("neuron_voters", VOTERS)
        if len(space.blocks) > 1:
            values["neurons__block"] = trial.suggest_categorical("block", space.blocks)
    values["tokens__policy"] = trial.suggest_categorical("tokens", space.tokens)
    if _prunes(values["tokens__policy"]):
        values["tokens__budget"] = "share"
        values["tokens__share"] = trial.suggest_int("token_percent", *PERCENT[:2], step=PERCENT[2]) / 100
        values["tokens__prune_layer"] = trial.suggest_int("prune_layer", 1, space.prune_layers)
        if "vote" in facts.token_policy(values["tokens__policy"]).wires:
            values["tokens__voters"] = trial.suggest_categorical("token_voters", VOTERS)
    return varied(space.base, **values)


def params_of(recipe: Recipe, space: Space) -> dict[str, Any] | None:
    """The nearest parameters of a recipe; None where its policies are not offered."""
    n, t = recipe.neurons, recipe.tokens
    if n.policy not in space.neurons or t.policy not in space.tokens:
        return None
    params: dict[str, Any] = {"neurons": n.policy, "tokens": t.policy}
    if _prunes(n.policy):
        params |= {"neuron_percent": _step(n.share), "neuron_voters": n.voters, "block": n.block}
    if _prunes(t.policy):
        layer = min(t.prune_layer, space.prune_layers)
        params |= {"token_percent": _step(t.share), "token_voters": t.voters, "prune_layer": layer}
    return params


def first(space: Space) -> list[tuple[dict[str, Any], Recipe | None]]:
    """Where a search starts: the bundle's own recipe as it is, and the corners (None: the recipe follows from the params)."""
    own = params_of(space.base, space)
    out: list[tuple[dict[str, Any], Recipe | None]] = [(own, space.base)] if own else []
    neurons = _own_or_first(space.base.neurons.policy, space.neurons)
    tokens = _own_or_first(space.base.tokens.policy, space.tokens)
    for neuron_percent, token_percent in CORNERS:
        values: dict[str, Any] = {"tokens__budget": "share"}
        values["neurons__policy"] = neurons if neuron_percent else "dense"
        values["tokens__policy"] = tokens if token_percent else "dense"
        values["neurons__share"] = neuron_percent / 100 if neuron_percent else None
        values["tokens__share"] = token_percent / 100 if token_percent else None
        values["tokens__prune_layer"] = max(1, min(space.base.tokens.prune_layer, space.prune_layers))
        params = params_of(varied(space.base, **values), space)
        if params and params not in [p for p, _ in out]:
            out.append((params, None))
    return out


def is_dense(recipe: Recipe) -> bool:
    """Whether nothing is pruned."""
    return not (_prunes(recipe.neurons.policy) or _prunes(recipe.tokens.policy))


def shares(recipe: Recipe) -> tuple[float | None, float | None]:
    """(neurons, image tokens) to ask for under this recipe; None where its policy prunes nothing or has no share."""
    n = recipe.neurons.share if _prunes(recipe.neurons.policy) else None
    t = recipe.tokens.share if _prunes(recipe.tokens.policy) and recipe.tokens.budget == "share" else None
    return n, t


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a build of this recipe reads a calibration."""
    n = recipe.neurons
    return "prior" in facts.neuron_policy(n.policy).wires or "calibrated" in (n.fill, n.layers) or n.block > 1


def _runs(base: Recipe, bundle: Bundle, **values: Any) -> bool:
    try:
        pipeline.check_recipe(varied(base, **values), bundle.shape)
    except InputError:
        return False
    return True


def _prunes(name: str) -> bool:
    return name != "dense"  # not `scores`: a policy may choose in decode and have none in prefill


def _own_or_first(own: str, offered: tuple[str, ...]) -> str:
    pruning = [name for name in offered if _prunes(name)]
    return own if own in pruning else pruning[0] if pruning else "dense"


def _step(share: float) -> int:
    low, high, step = PERCENT
    return min(high, max(low, step * round(100 * share / step)))
