"""Proofs that nothing broke, run by every build on CPU: traced equals PyTorch, full budget equals dense.

gate              compares                                               fails the build
vision            vision graph with transformers' tower                  yes, of a model that has one
prefill           dense prefill: logits and cache                        yes
decode            8 dense greedy steps: logits and token ids             yes
full budget       sparse graphs with all tokens and all neurons, dense   yes
core rows         rows of a made-up core set as decode gets them, with    yes, where the host names neurons
                  the same rows of the weights
functions         a step over these rows, with the step of the functions  yes, where the host names neurons
                  that the graph brings along, which read by index
predictor         copies by which decode chooses, with the weights       yes, where it does
turn              those 8 tokens read at once over the prefill's cache   yes, where the bundle has that graph

What the recipe's own budget costs is no proof and has no limit here: drift.py measures it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..backends.onnxruntime.backend import Backend, own  # proofs of the portable graphs, whatever the bundle runs on
from ..base.core_index import neuron_count
from ..base.errors import GateFailed
from ..bundle.names import core_row_names
from ..bundle.predictor import copy_error
from ..families import Arrays, Family, Pictures, Shape, Tower
from ..host.core_set import CoreSet
from ..host.decode import Row, teacher_forced
from ..host.request import Request, prefill_feeds, sparse_feeds
from ..recipe.recipe import Recipe
from ..source.probe import Probe

# Largest difference allowed, relative to max(1, largest reference value). float32 differs from PyTorch by 1e-6 where
# sums are short; sums over 10^4 terms in 28 layers bring it to some 1e-5, and a wrong mask or position to above 1e-2.
LIMIT = 1e-4
# Of a 4-bit copy, relative: .1 for weights like a Gaussian, up to .3 where a few are very large; in a wrong order 1.4.
COPY_LIMIT = 0.5
_REPORT = "no bundle was written; please report this checkpoint's config.json"


@dataclass(frozen=True)
class Gate:
    """One proof: the measured difference, its limit (None: only reported) and what was compared."""

    name: str
    value: float
    limit: float | None
    passed: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compared(
    name: str,
    where: str,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    limit: float | None,
    detail: str,
    fix: str,
) -> Gate:
    """The gate of outputs and what they must equal, by name. Raises GateFailed naming the one that differs most.

    Differences are relative to max(1, largest reference value). limit None: only reported. Whatever the limit, values that
    are no numbers, nothing to compare, and an output compared with itself fail.
    """
    if not pairs:
        raise GateFailed("there is nothing to compare", where=f"gate {name!r}, {where}", fix=fix)
    worst, value = "", -1.0
    for output, (ours, theirs) in pairs.items():
        at = f"gate {name!r}, {where}: {output}"
        if ours.shape != theirs.shape:
            raise GateFailed(f"shape {ours.shape}, expected {theirs.shape}", where=at, fix=fix)
        if not ours.size:
            raise GateFailed("is empty", where=at, fix=fix)
        if np.may_share_memory(ours, theirs):
            raise GateFailed("is compared with itself", where=at, fix=fix)
        for who, values in (("", ours), ("what it is compared with ", theirs)):
            if not np.isfinite(values).all():
                raise GateFailed(f"{who}holds NaN or infinity", where=at, fix=fix)
        difference = float(np.abs(ours.astype(np.float64) - theirs).max() / max(1.0, np.abs(theirs).max()))
        if difference > value:
            worst, value = output, difference
    if limit is not None and value > limit:
        what = f"differs by {value:.1e} (limit {limit:.0e})"
        raise GateFailed(what, where=f"gate {name!r}, {where}: {worst}", fix=fix)
    return Gate(name, value, limit, True, detail)


def paired(ours: Arrays, theirs: Arrays, where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every output beside what it must equal, by name. Raises GateFailed for one that only one side has."""
    if odd := sorted(ours.keys() ^ theirs.keys()):
        side = "is missing" if odd[0] in theirs else "has nothing to be compared with"
        raise GateFailed(side, where=f"{where}: {odd[0]}", fix=_REPORT)
    return {name: (ours[name], theirs[name]) for name in theirs}


@dataclass(frozen=True)
class Subject:
    """What is proved: the portable graphs of a bundle under way, and stock transformers' answers to the probe."""

    backend: Backend
    family: Family
    shape: Shape
    tower: Tower | None
    recipe: Recipe
    probe: Probe
    reference: Arrays


class _Proofs:
    """The gates so far, and what later ones compare with."""

    def __init__(self, subject: Subject):
        self.of = subject
        self.gates: list[Gate] = []

    def equal(self, name: str, graph: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], detail: str) -> None:
        self.gates.append(compared(name, f"{graph}.onnx", pairs, LIMIT, detail, _REPORT))

    def vision(self) -> Pictures:
        """The tower's outputs, all pictures of the probe in one run."""
        of = self.of
        if of.tower is None:
            return Pictures()
        found = of.backend.vision(of.tower.feeds(of.probe.pictures))
        names = [port.name for port in of.tower.outputs]
        expected = {n: of.reference[n] for n in names if n in of.reference}
        self.equal("vision", "vision", paired(found, expected, "vision.onnx"), "PyTorch")
        if of.backend.has_whole:  # what nearly every question runs through
            alone = [of.backend.vision(of.tower.feeds([picture])) for picture in of.probe.pictures]
            joined = {name: np.concatenate([part[name] for part in alone]) for name in alone[0]}
            self.equal("vision, one picture", "vision", paired(joined, expected, "vision.onnx"), "PyTorch")
        of.backend.drop("vision")
        return Pictures(found, tuple(picture.layout for picture in of.probe.pictures))

    def request(self, pictures: Pictures) -> Request:
        """The probe's prompt, with transformers' positions."""
        of = self.of
        request = Request.of(of.probe.ids, pictures, of.family, of.shape, of.backend.weights[of.family.embedding])
        pair = request.position_ids[:, 0], of.reference["position_ids"]
        self.equal("positions", "host", {"position_ids": pair}, "what PyTorch's rotary embedding got")
        return request

    def prefill(self, request: Request) -> tuple[Arrays, Any]:
        """The dense prefill: its logits, and its cache."""
        of = self.of
        dense, cache = of.backend.prefill(prefill_feeds(request), "prefill_dense")
        of.backend.drop("prefill_dense")
        ours = {"logits": dense["logits"][0]} | {n: v[0] for n, v in cache.arrays().items()}
        expected = {n.replace("cache", "past", 1): v for n, v in of.reference.items() if n.startswith("cache.")}
        expected |= {n: v for n, v in of.reference.items() if n == "logits"}
        pairs = paired(ours, expected, "prefill_dense.onnx")
        self.equal("prefill", "prefill_dense", pairs, "PyTorch: logits, keys, values")
        return dense, cache

    def decode(self, request: Request, cache: Any) -> np.ndarray:
        """Eight dense steps, and the first of them through the graph as it is: logits [steps,V]."""
        of = self.of
        row = Row(request, CoreSet.whole(of.shape), cache, of.reference["logits"], "decode_dense")
        expected = of.reference["step_logits"]
        pairs = {}
        if len(expected) and of.reference["tokens"].size:  # else there is no step, which fails below
            pairs["as it is"] = self._as_written(row, int(of.reference["tokens"][0]), {}), expected[0]
        steps = self._steps(row)
        pairs |= _by_step(steps, expected)
        diverged = _first_difference(steps, of.reference["step_logits"])
        self.equal("decode", "decode_dense", pairs, f"PyTorch: {len(steps)} greedy steps, {diverged}")
        return steps

    def full_budget(self, request: Request, dense: Arrays, cache: Any, steps: np.ndarray) -> None:
        """Sparse graphs that keep every token and every neuron."""
        of = self.of
        feeds = prefill_feeds(request) | sparse_feeds(request, of.recipe, token_share=1.0)
        full, kept = of.backend.prefill(feeds, "prefill")
        ours, theirs = ({**found, **rows.arrays()} for found, rows in ((full, kept), (dense, cache)))
        pairs = paired({n: v for n, v in ours.items() if n in theirs}, theirs, "prefill.onnx")
        self.equal("full budget, prefill", "prefill", pairs, "dense prefill")
        of.backend.drop("prefill")
        listed = full["kept_tokens"][0] if of.recipe.tokens.cache == "index" and "kept_tokens" in full else None
        if of.recipe.neurons.in_decode:  # at full budget nothing depends on them
            self._predictor()
        elif not of.recipe.neurons.by_threshold:  # nor on which rows are named
            core = self._made_up_core()
            self._core_rows(core)
            self._functions(Row(request, core, cache, dense["logits"][0], listed=listed))
        sparse = self._steps(Row(request, CoreSet.whole(of.shape), cache, dense["logits"][0], listed=listed))
        detail = "dense decode with every neuron and token"
        self.equal("full budget, decode", "decode", _by_step(sparse, steps), detail)

    def _made_up_core(self) -> CoreSet:
        """Random neurons of every layer, as many as the recipe's share says."""
        shape, neurons, rng = self.of.shape, self.of.recipe.neurons, np.random.default_rng(0)
        if neurons.policy == "dense":
            return CoreSet.whole(shape)
        count = neuron_count(neurons.share, shape.ffn)
        ids = np.stack([np.sort(rng.permutation(shape.ffn)[:count]) for _ in range(shape.layers)])
        return CoreSet(ids[:, None].astype(np.int32), np.full(shape.layers, count, np.int64), shape.ffn)

    def _core_rows(self, core: CoreSet) -> None:
        """The rows that decode would get for this set, all of them exactly."""
        of = self.of
        gathered = of.backend.rows.gather([core])
        for layer, names in enumerate(core_row_names(of.family, of.shape.layers)):
            for part, name in zip(("gate", "up", "down"), names, strict=True):
                wanted = of.backend.weights[name][core.of_layer(layer)]
                if not np.array_equal(gathered.rows[f"ffn.{layer}.{part}"], wanted[None]):
                    raise GateFailed("other rows than those named", where=f"gate 'core rows', {name}", fix=_REPORT)
        detail = f"{core.counts[0]} of {core.ffn} rows a layer, exactly"
        self.gates.append(Gate("core rows", 0.0, 0.0, True, detail))

    def _functions(self, row: Row) -> None:
        """A step through gathered rows, and through the functions in the graph, which any other runtime would run."""
        backend, core = self.of.backend, row.core
        assert core.neurons is not None  # the made-up set names them
        token, named = int(row.last.argmax()), {"core_neurons": core.neurons, "core_counts": core.counts}
        named |= {"core_bias": np.zeros((self.of.shape.layers, 1, self.of.shape.hidden), np.float32)}
        by_index = self._as_written(row, token, named)
        gathered = teacher_forced(backend, row, [token])[1]
        self.equal("functions", "decode", {"logits": (by_index, gathered)}, "the same step over gathered rows")

    def _as_written(self, row: Row, token: int, core: Arrays) -> np.ndarray:
        """Logits [V] after a token, through the graph as any runtime would run it: nothing gathered, no cache written into."""
        request, session = row.request, self.of.backend.session(row.graph, rows_as_inputs=False)
        feeds = {"inputs_embeds": request.embedded([token])[None], "attention_mask": row.mask(1)[None], **core}
        feeds |= {"position_ids": request.positions_after(0, 1)[:, None], **own(row.cache).arrays()}
        if (listed := row.rows_read(1)) is not None:
            feeds["core_tokens"] = listed[None]
        given = {i.name: np.ascontiguousarray(feeds[i.name]) for i in session.get_inputs()}
        return np.array(session.run(["logits"], given)[0][0, -1])

    def _predictor(self) -> None:
        of = self.of
        assert of.backend.predictor is not None  # a recipe that chooses in decode brings the copies
        error, worst = copy_error(of.backend.predictor, of.backend.weights, of.family, of.shape)
        holds = 0 <= error <= COPY_LIMIT  # below 0: nothing was compared
        self.gates.append(Gate("predictor", error, COPY_LIMIT, holds, "low-bit copies and the weights"))
        if not self.gates[-1].passed:
            fix = "no bundle was written; check memory and disk, or choose another neuron policy"
            raise GateFailed(
                f"differs by {error:.1e} (limit {COPY_LIMIT})", where=f"gate 'predictor', {worst}", fix=fix
            )

    def turn(self, request: Request, cache: Any) -> None:
        """The reference's tokens read at once over the prefill's cache."""
        of, ids = self.of, self.of.reference["tokens"].tolist()
        later = request.extended(ids)
        feeds = {
            "inputs_embeds": later.inputs_embeds[:, request.tokens :],
            "position_ids": later.position_ids[:, :, request.tokens :],
            "attention_mask": np.ones((1, later.tokens), np.int64),
            "image_mask": later.is_image,
            "picture": later.picture,
            "question": np.array([1]),
        }
        found, _ = of.backend.turn(feeds | sparse_feeds(request, of.recipe, token_share=1.0), cache)
        of.backend.drop("turn")
        pair = found["logits"][0], of.reference["step_logits"][-1]
        self.equal("turn", "turn", {"logits": pair}, f"PyTorch after {len(ids)} steps")

    def _steps(self, row: Row) -> np.ndarray:
        """Logits [steps,V] after each of the reference's tokens; the session is freed afterwards."""
        logits = teacher_forced(self.of.backend, row, self.of.reference["tokens"].tolist())
        self.of.backend.drop(row.graph)
        return logits[1:]


def run_gates(subject: Subject) -> list[Gate]:
    """All gates in order. Raises GateFailed at the first that does not hold, naming the graph and the output.

    One large session lives at a time, so that memory stays at one mapping of the weights.
    """
    proofs = _Proofs(subject)
    request = proofs.request(proofs.vision())
    dense, cache = proofs.prefill(request)
    steps = proofs.decode(request, cache)
    proofs.full_budget(request, dense, cache, steps)
    if subject.recipe.has_turn:
        proofs.turn(request, cache)
    return proofs.gates


def _by_step(ours: np.ndarray, theirs: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    named = ({f"logits of step {i}": step for i, step in enumerate(steps)} for steps in (ours, theirs))
    return paired(next(named), next(named), "decode")


def _first_difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    differ = np.flatnonzero(ours.argmax(-1) != theirs.argmax(-1))
    return f"first diverging token at step {differ[0]}" if len(differ) else "every token the same"
