"""A recipe: model x policies x budgets x target, frozen, read from TOML with unknown keys refused.

    [neurons]                     [tokens]
    policy = "griffin"            policy = "spread_keys" # a file in policies/tokens/
    share = 0.6                   share = 0.5            # of the image tokens

Where nothing of [neurons] is asked, ONNX Runtime gets `active`, which holds a real language model (docs/active.md), and an engine
or a tiny model every neuron: no set of neurons per answer that was measured holds one (docs/quality.md). The other defaults won
on the models of our own; the paper's pair is `coreinfer` with `overlap`.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import by_name
from ..base.errors import InputError
from . import facts
from .engine import EngineSettings, check_engine
from .option import check_fields, kind, option
from .stored import StoredWeights, check_stored

if TYPE_CHECKING:
    from ..families import Shape

BACKENDS = "cm_export.backends"
VOTERS = ("all", "text", "last")
BLOCKS = (1, 8, 16, 32)
TINY = 2**25  # weights of a decoder below which neither fewer bits nor fewer rows make a step much faster
ACTIVE_SHARE = 0.83  # keeps at least .95 of the next tokens of a small language model (docs/active.md)
QUESTION = 512  # tokens of a prompt beside those of its picture, for which engines hold room
_OF_ACTIVE = ("neurons__share", "neurons__rest_share")
LEAST_ACTIVE = 0.2  # share that a policy of thresholds can be asked for
BEFORE_LAYERS = {"embeds", "image_mask", "vote", "seed"}  # what a token policy can read before the first layer


@dataclass(frozen=True)
class Neurons:
    """Which FFN neurons decode computes (METHOD: core neurons; CoreInfer arXiv 2410.18311)."""

    policy: str = option(
        "griffin",
        "--neurons",
        "Neuron policy; where nothing of [neurons] is set, active on ONNX Runtime, dense for engines and tiny models",
        registry=facts.NEURONS,
        what="neuron policy",
    )
    share: float = option(0.6, "--neuron-share", "Share of FFN neurons that decode computes", share=True)
    rest_share: float = option(
        0.95,
        "--rest-share",
        "Share of the weights of attention's products and of the head that decode reads (active)",
        share=True,
    )
    voters: str = option("all", "", "Whose activations choose the neurons", choices=VOTERS)
    counted: str = option(
        "kept",
        "",
        "Over which tokens: those that the token cut keeps, or all that a layer has seen",
        choices=("kept", "all"),
    )
    rho: float = option(
        0.2, "", "Share of neurons that each token votes for: its strongest positive ones (coreinfer)", share=True
    )
    row_norm: bool = option(
        False,
        "",
        "Multiply energies by the squared norm of the down row, so that what is really added counts (griffin)",
    )
    image_weight: float = option(
        1.0, "", "Weight of an image token's vote; a text token has 1 (griffin, glass)", low=0, high=1
    )
    mix: float = option(0.5, "", "Weight of the calibration against the prompt (glass)", low=0, high=1)
    fill: str = option(
        "none",
        "--fill",
        "What stands in for dropped neurons: nothing, or their mean in the prompt or in the calibration",
        choices=("none", "prompt", "calibrated"),
    )
    layers: str = option(
        "uniform",
        "--neuron-layers",
        "The same number of neurons in every layer, or as the calibration's sensitivities say",
        choices=("uniform", "calibrated"),
    )
    # Above 1, the calibration's order of neurons is put into the weights first.
    block: int = option(1, "--neuron-block", "Neighbouring neurons that are chosen together", choices=BLOCKS)

    @property
    def in_decode(self) -> bool:
        """Whether the decode graph itself lists neurons, anew for every token."""
        return facts.neuron_policy(self.policy).in_decode

    @property
    def by_threshold(self) -> bool:
        """Whether decode reads what is above a threshold, in every product."""
        return facts.neuron_policy(self.policy).by_threshold


@dataclass(frozen=True)
class Tokens:
    """Which image tokens run from `prune_layer` on (METHOD: core tokens; CoreMatching arXiv 2505.19235, section 4)."""

    policy: str = option("spread_keys", "--tokens", "Token policy", registry=facts.TOKENS, what="token policy")
    budget: str = option(
        "share",
        "--token-budget",
        "What says how many image tokens are kept: a share, a count, or the knee of their scores",
        choices=("share", "count", "knee"),
    )
    share: float = option(0.5, "--token-share", "Share of image tokens kept after the cut", share=True)
    count: int = option(0, "--token-count", "Image tokens kept; implies --token-budget count", low=1)
    min_share: float = option(0.1, "", "Least share that budget = knee keeps", share=True)
    max_share: float = option(0.9, "", "Largest share that budget = knee keeps", share=True)
    # Noise has knees of depth .29.
    knee_confidence: float = option(
        0.3, "", "A knee less deep than this part of the scores' range counts as none: the share is kept", low=0, high=1
    )
    quota: str = option(
        "shared",
        "--token-quota",
        "One budget shared by all pictures of a prompt, or one for each",
        choices=("shared", "each"),
    )
    prune_layer: int = option(
        2, "--prune-layer", "Layers that run with every token before the cut; 0: the calibration's best", low=0
    )
    first: str = option(
        "none", "--first-cut", "Token policy of a further cut before the first layer, such as spread, or none"
    )
    first_share: float = option(0.5, "--first-share", "Share of image tokens that the first cut leaves", share=True)
    layers: str = option(
        "last",
        "--token-layers",
        "Score in the last layer before the cut, or add the scores of all layers before it",
        choices=("last", "all"),
    )
    voters: str = option("all", "--voters", "Whose attention or activations judge the image tokens", choices=VOTERS)
    rho: float = option(
        0.2, "", "Share of neurons that each token votes for: its strongest positive ones (overlap)", share=True
    )
    beta: float = option(0.4, "", "Share of neurons that those votes choose as the core set (overlap)", share=True)
    cache: str = option(
        "cut",
        "--token-cache",
        "Cut: dropped tokens leave computation and cache; index: the cache stays whole, decode reads the listed rows",
        choices=("cut", "index"),
    )

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

    model: str | None = option(
        None,
        "--model",
        "demo, scenes, qwen2-vl, smolvlm2-2.2b or another short name, a directory, or a hub id owner/name[@revision]",
    )
    revision: str | None = option(None, "--revision", "Commit, branch or tag of a hub id")
    adapter: str | None = option(
        None, "--adapter", "Directory of a LoRA adapter, as peft saves it, that is merged into the weights", path=True
    )
    neurons: Neurons = field(default_factory=Neurons)
    tokens: Tokens = field(default_factory=Tokens)
    weights: StoredWeights = field(default_factory=StoredWeights)
    engine: EngineSettings = field(default_factory=EngineSettings)
    dtype: str = option("float32", "", "Type of the graphs' weights", choices=("float32",))
    backend: str = option("onnxruntime", "--backend", "What the bundle runs on", registry=BACKENDS, what="backend")
    seed: int = option(0, "--seed", "Seed of the random policies", low=0, high=2**31 - 1)
    calibration: str | None = option(
        None, "--calibration", "File of `cm-export calibrate`; the bundle keeps a copy", path=True
    )
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

    def for_model(self, shape: "Shape") -> "Recipe":
        """The recipe as a bundle of this model records it; of a tiny model, neurons that nobody asked to prune stay.

        Without pictures, so do tokens; a cut that nobody placed gives way to layers that must see every token, and limits
        of engines that nobody chose to the largest picture.
        """
        found = self._weighed(shape)._holding(shape)
        if not shape.sees and not self._asked("tokens"):
            return found.replace(tokens__policy="dense")
        if "tokens__prune_layer" not in self.chosen and 0 < self.tokens.prune_layer < shape.whole_layers:
            return found.replace(tokens__prune_layer=shape.whole_layers)
        return found

    def _weighed(self, shape: "Shape") -> "Recipe":
        """The same with neurons and bits of weights decided, where nobody has asked for any.

        Of a model that is not tiny, ONNX Runtime reads 8 bits a weight, and of those what is above thresholds: this keeps
        what the model says (docs/active.md). Where a set of neurons is fixed per answer, its rows are float32.
        """
        pays = shape.weights >= TINY and self.backend == "onnxruntime"
        found = self
        if not self._asked("neurons"):
            found = found.replace(neurons__policy="active" if pays else "dense")
        elif pays and all(key in _OF_ACTIVE for key in self.chosen if key.startswith("neurons__")):
            found = found.replace(neurons__policy="active")  # a share alone was asked for
        if found.neurons.by_threshold and "neurons__share" not in self.chosen:
            found = found.replace(neurons__share=ACTIVE_SHARE)
        if found.weights.is_open:
            fixed = found.neurons.policy != "dense" and not found.neurons.by_threshold
            found = found.replace(weights__precision="int8" if pays and not fixed else "fp32")
        return found

    def _holding(self, shape: "Shape") -> "Recipe":
        """The same with engines that take the largest picture, a question about it and an answer, where nobody chose less."""
        engine, (patches, tokens) = self.engine, shape.largest
        prompt = max(engine.max_prompt, tokens + QUESTION)
        wanted = {
            "max_patches": max(engine.max_patches, patches),
            "max_prompt": prompt,
            "capacity": max(engine.capacity, prompt + engine.capacity - engine.max_prompt),
        }
        if tokens and not {f"engine__{key}" for key in wanted} & self.chosen:
            return self.replace(**{f"engine__{k}": v for k, v in wanted.items() if v != getattr(engine, k)})
        return self

    def _asked(self, table: str) -> bool:
        """Whether somebody set a key of this table."""
        return any(key.startswith(f"{table}__") for key in self.chosen)

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
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise InputError(f"cannot read the recipe ({e.strerror})", where=path) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"not valid TOML ({e})", where=path) from e
    for key in ("calibration", "adapter"):
        if isinstance(values.get(key), str):  # beside the recipe, wherever the command runs
            values[key] = str(path.parent / values[key])
    return from_dict(values, str(path))


def check(recipe: Recipe, where: str = "recipe") -> Recipe:
    """The same recipe, or InputError naming the first field that cannot hold."""
    n, t = recipe.neurons, recipe.tokens
    policy = facts.neuron_policy(n.policy)
    facts.token_policy(t.policy)
    for table, prefix in ((recipe, ""), (n, "neurons."), (t, "tokens.")):
        check_fields(table, prefix, where)
    if n.image_weight != 1 and n.policy == "coreinfer":
        fix = "use neurons.voters, or another policy"
        raise InputError("neurons.image_weight with coreinfer, which counts whole tokens", where=where, fix=fix)
    if n.fill != "none" and (n.in_decode or n.by_threshold):
        fix = "leave neurons.fill out: what a token's own set drops is small for this token, not on average"
        raise InputError(f"neurons.fill with {n.policy}, which chooses anew for every token", where=where, fix=fix)
    if n.by_threshold:
        _check_active(n, where)
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
        raise InputError("tokens.budget is 'count' without a count", where=where, fix="give tokens.count, 1 or more")
    _check_first(t, where)
    check_engine(recipe.engine, where)
    check_stored(recipe.weights, where)
    fixed = recipe._asked("neurons") and not (n.policy == "dense" or n.by_threshold)
    if recipe.weights.of("ffn") < 32 and fixed:
        what = f"weights.ffn of {recipe.weights.of('ffn')} bits with neurons.policy = {n.policy!r}"
        fix = "give --neurons active (or dense): sets of rows are gathered from float32 weights only"
        raise InputError(what, where=where, fix=fix)
    return recipe


def _check_active(n: Neurons, where: str) -> None:
    """What a policy of thresholds cannot be combined with."""
    for name, wrong in (("layers", n.layers != "uniform"), ("block", n.block != 1)):
        if wrong:
            fix = f"leave neurons.{name} out: thresholds are allotted to layers by sensitivity, channel by channel"
            raise InputError(f"neurons.{name} with {n.policy}", where=where, fix=fix)
    for name, share in (("share", n.share), ("rest_share", n.rest_share)):
        if share < LEAST_ACTIVE:
            fix = f"give {LEAST_ACTIVE} or more: nothing was measured below"
            raise InputError(f"neurons.{name} = {share:g} with {n.policy}", where=where, fix=fix)


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
        make = fields[key].default_factory
        default = fields[key].default if make is dataclasses.MISSING else make()
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise InputError(f"{key} must be a table", where=where, fix=f"write [{key}] and its keys below it")
            out[key] = _build(type(default), value, f"{where} [{key}]")
            continue
        wanted = kind(fields[key])
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
            raise InputError(f"{key} = {value!r} is not a {wanted.__name__}", where=where, fix="correct its type")
        out[key] = value
    return cls(**out)
