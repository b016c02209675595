"""A recipe: model x policies x budgets x target, frozen, read from TOML with unknown keys refused.

    [neurons]                     [tokens]
    policy = "griffin"            policy = "spread_keys" # a file in policies/tokens/
    share = 0.6                   share = 0.5            # of the image tokens

The defaults are what won on the demo model (LOG.md); the paper's own pair is `coreinfer` with `overlap`.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base import by_name
from ..base.errors import InputError
from ..families import Shape
from . import facts
from .engine import Engine, check_engine

VOTERS = ("all", "text", "last")
BUDGETS = ("share", "count", "knee")
CACHES = ("cut", "index")
QUOTAS = ("shared", "each")
SCORED = ("last", "all")
COUNTED = ("kept", "all")
BEFORE_LAYERS = {"embeds", "image_mask", "vote", "seed"}  # what a token policy can read before the first layer
FILLS = ("none", "prompt", "calibrated")
LAYERS = ("uniform", "calibrated")
BLOCKS = (1, 8, 16, 32)


@dataclass(frozen=True)
class Neurons:
    """Which FFN neurons decode computes (METHOD: core neurons; CoreInfer arXiv 2410.18311)."""

    policy: str = "griffin"
    share: float = 0.6  # K / F, at run time changeable
    voters: str = "all"  # whose activations are counted
    counted: str = "kept"  # over which tokens: those that the token cut keeps, or all that a layer has seen
    rho: float = 0.2  # token-wise share of positive activations (coreinfer)
    row_norm: bool = False  # griffin: energies times the squared norm of the down row, so of what is really added
    image_weight: float = 1.0  # of an image token's vote, text tokens have 1 (griffin, glass)
    mix: float = 0.5  # weight of the calibration's prior against the prompt (glass)
    fill: str = "none"  # what stands in for dropped neurons: nothing, their mean in the prompt, or in the calibration
    layers: str = "uniform"  # the same K in every layer, or as the calibration's sensitivities say
    block: int = 1  # neighbours chosen together; above 1, a calibration's order is put into the weights first

    @property
    def in_decode(self) -> bool:
        """Whether the decode graph itself chooses, anew for every token."""
        return facts.neuron_policy(self.policy).in_decode


@dataclass(frozen=True)
class Tokens:
    """Which image tokens run from `prune_layer` on (METHOD: core tokens; CoreMatching arXiv 2505.19235, section 4)."""

    policy: str = "spread_keys"
    budget: str = "share"  # share | count | knee
    share: float = 0.5  # of the image tokens; the fallback of `knee`
    count: int = 0  # image tokens kept, when budget = "count"
    min_share: float = 0.1  # clamp of `knee`
    max_share: float = 0.9
    knee_confidence: float = 0.3  # a knee less deep than this share of the scores' range is none: noise reaches .29
    quota: str = "shared"  # shared: one budget for all pictures of a prompt; each: every picture keeps its own
    prune_layer: int = 2  # layers that run with every token before the cut; 0: as the calibration found best
    first: str = "none"  # token policy of a cut before the first layer, after which the policy above chooses
    first_share: float = 0.5  # of the image tokens, left by that first cut
    layers: str = "last"  # whose scores count: the layer before the cut, or the sum over all layers before it
    voters: str = "all"  # whose attention or activations judge the image tokens
    rho: float = 0.2
    beta: float = 0.4  # share of neurons in that core set
    cache: str = "cut"  # cut: dropped tokens leave the computation and the KV; index: decode reads listed rows

    @property
    def whole_cache(self) -> bool:
        """Whether every row stays in the cache, as checks against the dense model and later questions need it."""
        return self.policy == "dense" or self.cache == "index"

    @property
    def later(self) -> str:
        """How a later question finds its tokens: "again" (its text judges), "same" (no question matters), "no".

        "no": the policy (or that of a first cut) reads activations or embeddings, which are not kept.
        """
        wires = set(facts.token_policy(self.policy).wires)
        if self.first != "none":
            return "no"
        if not wires & {"q", "z", "vote"}:
            return "same"
        return "again" if wires <= {"q", "k", "v", "mask", "vote", "image_mask", "seed"} else "no"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a bundle is, besides the checkpoint itself."""

    model: str | None = None
    revision: str | None = None
    neurons: Neurons = field(default_factory=Neurons)
    tokens: Tokens = field(default_factory=Tokens)
    engine: Engine = field(default_factory=Engine)
    dtype: str = "float32"
    backend: str = "onnxruntime"
    seed: int = 0
    calibration: str | None = None  # file written by `cm-export calibrate`; the bundle keeps a copy
    # Keys such as tokens__policy that somebody set: a default may give way to the model, a choice may not.
    chosen: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        """A backend has one spelling, tensorrt-rtx, also where the name of its file was given."""
        object.__setattr__(self, "backend", self.backend.replace("_", "-"))

    @property
    def has_turn(self) -> bool:
        """Whether a bundle can answer a later question about the same pictures, and so has the graph for it."""
        return self.tokens.whole_cache and self.tokens.later != "no"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest and for hashing."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "chosen"}

    def for_model(self, shape: Shape) -> "Recipe":
        """The recipe as a bundle of this model records it: without pictures, tokens that nobody asked to prune stay."""
        asked = any(key.startswith("tokens__") for key in self.chosen)
        if not shape.sees and not asked:
            return self.replace(tokens__policy="dense")
        if "tokens__prune_layer" not in self.chosen and 0 < self.tokens.prune_layer < shape.whole_layers:
            return self.replace(tokens__prune_layer=shape.whole_layers)
        return self

    def replace(self, **overrides: Any) -> "Recipe":
        """A copy with `neurons__share=0.4`-style overrides; None means `as it was`. Validated."""
        top: dict[str, Any] = {}
        for key, value in overrides.items():
            if value is None:
                continue
            section, _, name = key.partition("__")
            if name:
                top[section] = dataclasses.replace(top.get(section, getattr(self, section)), **{name: value})
            else:
                top[section] = value
        top["chosen"] = self.chosen | {k for k, v in overrides.items() if v is not None}
        return check(dataclasses.replace(self, **top))


def from_dict(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A validated recipe from nested plain values. Raises InputError that names an unknown key and the nearest one."""
    recipe = _build(Recipe, values, where)
    tables = {k: v for k, v in values.items() if isinstance(v, dict)}
    chosen = frozenset({*values, *(f"{table}__{key}" for table, keys in tables.items() for key in keys)})
    return check(dataclasses.replace(recipe, chosen=chosen), where)


def load(name_or_path: str) -> Recipe:
    """A recipe by the name of a file in recipes/ or by path. Raises InputError."""
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        folder = Path(__import__("cm_export.recipes", fromlist=["recipes"]).__path__[0])
        known = sorted(p.stem for p in folder.glob("*.toml"))
        if name_or_path not in known:
            raise InputError(f"unknown recipe {name_or_path!r}", fix=by_name.nearest(name_or_path, known))
        path = folder / f"{name_or_path}.toml"
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # the same under its older name
        import tomli as tomllib
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read the recipe ({e.strerror})", where=path) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"not valid TOML ({e})", where=path) from e
    if isinstance(values.get("calibration"), str):  # beside the recipe, wherever the command runs
        values["calibration"] = str(path.parent / values["calibration"])
    return from_dict(values, str(path))


def check(recipe: Recipe, where: str = "recipe") -> Recipe:
    """The same recipe, or InputError naming the first field that cannot hold."""
    n, t = recipe.neurons, recipe.tokens
    policy = facts.neuron_policy(n.policy)
    facts.token_policy(t.policy)
    by_name.check("cm_export.backends", recipe.backend.replace("-", "_"), "backend")
    for label, value, allowed in (
        ("neurons.voters", n.voters, VOTERS),
        ("neurons.fill", n.fill, FILLS),
        ("neurons.layers", n.layers, LAYERS),
        ("tokens.voters", t.voters, VOTERS),
        ("tokens.budget", t.budget, BUDGETS),
        ("tokens.cache", t.cache, CACHES),
        ("tokens.quota", t.quota, QUOTAS),
        ("tokens.layers", t.layers, SCORED),
        ("neurons.counted", n.counted, COUNTED),
        ("dtype", recipe.dtype, ("float32",)),
    ):
        if value not in allowed:
            raise InputError(f"{label} = {value!r}", where=where, fix=by_name.nearest(str(value), list(allowed)))
    for label, share in (
        ("neurons.share", n.share),
        ("neurons.rho", n.rho),
        ("tokens.share", t.share),
        ("tokens.min_share", t.min_share),
        ("tokens.max_share", t.max_share),
        ("tokens.first_share", t.first_share),
        ("tokens.rho", t.rho),
        ("tokens.beta", t.beta),
    ):
        if not 0 < share <= 1:  # also refuses nan
            raise InputError(f"{label} = {share} is not a share", where=where, fix="give a number above 0 and up to 1")
    for label, share in (
        ("neurons.image_weight", n.image_weight),
        ("neurons.mix", n.mix),
        ("tokens.knee_confidence", t.knee_confidence),
    ):
        if not 0 <= share <= 1:
            raise InputError(f"{label} = {share}", where=where, fix="give a number from 0 to 1")
    if n.block not in BLOCKS:
        raise InputError(f"neurons.block = {n.block}", where=where, fix=f"known: {', '.join(map(str, BLOCKS))}")
    if n.image_weight != 1 and n.policy == "coreinfer":
        fix = "use neurons.voters, or another policy"
        raise InputError("neurons.image_weight with coreinfer, which counts whole tokens", where=where, fix=fix)
    if n.fill != "none" and n.in_decode:
        fix = "leave neurons.fill out: what a token's own set drops is small for this token, not on average"
        raise InputError(f"neurons.fill with {n.policy}, which chooses anew for every token", where=where, fix=fix)
    needs = {"neurons.fill": n.fill == "calibrated", "neurons.layers": n.layers == "calibrated"}
    needs[f"neurons.policy = {n.policy!r}"] = "prior" in policy.wires
    needs["tokens.prune_layer = 0"] = t.prune_layer == 0
    if recipe.calibration is None and any(needs.values()):
        label = next(k for k, v in needs.items() if v)
        fix = "run `cm-export calibrate` and name its file (recipe: calibration, or build --calibration)"
        raise InputError(f"{label} needs a calibration", where=where, fix=fix)
    if t.min_share > t.max_share:
        raise InputError("tokens.min_share is above tokens.max_share", where=where, fix="swap them")
    if t.budget == "count" and t.count < 1:
        raise InputError("tokens.budget is 'count' without a count", where=where, fix="set tokens.count to 1 or more")
    if t.prune_layer < 0:
        fix = "give 1 or more: at least one layer must run to score; 0 takes the calibration's"
        raise InputError(f"tokens.prune_layer = {t.prune_layer}", where=where, fix=fix)
    _check_first(t, where)
    check_engine(recipe.engine, where)
    if not 0 <= recipe.seed < 2**31:
        raise InputError(f"seed = {recipe.seed}", where=where, fix="give an integer from 0 to 2147483647")
    return recipe


def _check_first(t: Tokens, where: str) -> None:
    """The cut before the first layer: a policy that needs no layer, and a share that leaves the second one its choice."""
    if t.first == "none":
        return
    policies = ((n, facts.token_policy(n)) for n in by_name.names_in(facts.TOKENS))
    able = [n for n, policy in policies if policy.scores and set(policy.wires) <= BEFORE_LAYERS]
    if t.first not in able:
        fix = by_name.nearest(t.first, ["none", *able])
        raise InputError(f"tokens.first = {t.first!r} cannot choose before the first layer", where=where, fix=fix)
    if t.policy == "dense":
        raise InputError("tokens.first without a token policy", where=where, fix=f"give tokens.policy = {t.first!r}")
    least = t.share if t.budget == "share" else t.min_share if t.budget == "knee" else 0
    if t.first_share < least:
        fix = "the first cut must leave at least what the second one keeps"
        raise InputError(f"tokens.first_share = {t.first_share} is below {least}", where=where, fix=fix)


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from a mapping; nested dataclasses from nested mappings, types checked."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.compare}
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"unknown key {key!r}", where=where, fix=by_name.nearest(key, sorted(fields)))
        default = fields[key].default_factory() if callable(fields[key].default_factory) else fields[key].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"{key} must be a table", where=where, fix=f"write [{key}] and its keys below it")
            out[key] = _build(type(default), value, f"{where} [{key}]")
            continue
        wanted = str if default is None else type(default)
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
            raise InputError(f"{key} = {value!r} is not a {wanted.__name__}", where=where, fix="correct its type")
        out[key] = value
    return cls(**out)
