"""Proofs that lowering for TensorRT broke nothing, run by ONNX Runtime before any engine is built.

gate                  compares                                                  fails the build
lowered vision        the lowered graph in float32 with the portable one        yes
lowered prefill       all tokens kept: logits, scores, cache                    yes
lowered decode        8 steps with every neuron, over the static cache          yes
lowered choice        tokens kept at the recipe's budget: share that is the     no: float32 scores may fall otherwise where
                      same                                                      float64 ones are nearly equal
half ...              the graphs as they are built, with the portable ones      yes; said so where memory is short
packing               int8 and int4 weights as written, with the weights        yes
half choice           core neurons at the recipe's share that are the same      no
"""

from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..backends.onnxruntime.backend import Backend, Rows
from ..backends.tensorrt.export import Source, listed_block, lowered, lowered_with_parts, weight_file
from ..backends.tensorrt.rehearsal import LoweredGraphs, every_neuron_listed, listed, run, static_rows, step_feeds
from ..backends.tensorrt.targets import Target
from ..base.core_index import neuron_count, select_core_neurons
from ..base.errors import GateFailed
from ..bundle.names import core_row_names
from ..bundle.weights import WeightFile
from ..families import Family, Pictures, Tower
from ..host.core_rows import CoreRows
from ..host.core_set import CoreSet
from ..host.decode import Row, teacher_forced
from ..host.request import Request, kept_slots, prefill_feeds, sparse_feeds
from ..quant.error import relative_error
from ..quant.precision import HALF, PRECISIONS
from ..source.probe import Probe
from .gates import LIMIT, Gate, compared, paired

STEPS = 8
# 16-bit products of a few thousand terms differ by some 1e-3 of the largest value; a lost cast, mask or scale by above 1e-1.
HALF_LIMIT = 3e-2
# Of one weight, relative: rounding a Gaussian to 4 bits in groups of 64 costs .12, to 8 bits .007; a wrong order 1.4.
PACK_LIMIT = {4: 0.4, 8: 0.04}
Feeds = dict[str, np.ndarray]
Answers = dict[str, dict[str, np.ndarray]]  # by graph, then by output


def run_gates(
    source: Source, target: Target, family: Family, tower: Tower | None, probe: Probe, folder: Path, threads: int = 0
) -> list[Gate]:
    """All gates. Raises GateFailed. `folder` holds the weights of the lowered graphs, as `write_graphs` left it."""
    name = source.recipe.engine.precision
    precision = PRECISIONS[name]
    packing = [_packing(source, target, folder, precision.weights.bits)] if precision.weights else []  # runs nothing
    portable = _Portable(source, family, threads)
    expected = _answers(portable, source, family, tower, probe)
    portable.backend.drop(*source.graphs)
    exact = _Exact(source, target, family, threads)
    found = _answers(exact, source, family, tower, probe)
    exact.backend.drop(*source.graphs)
    gates = [_gate(f"lowered {g}", g, found, expected, LIMIT, f"portable graph; for {target.name}") for g in expected]
    gates.append(_choice(exact.chosen, portable.chosen))
    weight_bytes = sum(f.stat().st_size for f in folder.glob("weights.*.safetensors"))
    free = psutil.virtual_memory().available
    if precision.type != HALF:
        detail = "nothing is halved" if name == "fp32" else f"not run: ONNX Runtime has no {name} on a CPU"
        return [*gates, Gate("half precision", 0.0, None, True, detail)]
    if 4 * weight_bytes > free:  # ONNX Runtime computes in float32 what it holds in 16 bit: a copy of each
        detail = f"not run: {4 * weight_bytes / 1e9:.0f} GB of memory needed, {free / 1e9:.0f} GB free"
        return [*gates, *packing, Gate("half precision", 0.0, None, True, detail)]
    found = _answers(_Half(source, target, family, folder, threads), source, family, tower, probe)
    ours, theirs = (a["prefill"].pop("core_scores", None) for a in (found, expected))  # may be counts, which jump
    gates += packing
    # What low bits cost is for the evaluation of answers to say; the vision tower has none.
    limits = {g: None if precision.packs and g != "vision" else HALF_LIMIT for g in expected}
    gates += [_gate(f"half {g}", g, found, expected, limits[g], "portable graph in float32") for g in expected]
    return [*gates, _same_neurons(ours, theirs, source.recipe.neurons.share)]


def _answers(graphs: Any, source: Source, family: Family, tower: Tower | None, probe: Probe) -> Answers:
    """What the probe gives: tower outputs, a prefill that keeps every token, 8 steps of decode with every neuron."""
    recipe, out, pictures = source.recipe, {}, Pictures()
    if tower:
        # All pictures at once; an engine gets them one by one, through the same graph.
        found = {n: v.astype(np.float32) for n, v in graphs.run("vision", tower.feeds(probe.pictures)).items()}
        out["vision"] = found
        pictures = Pictures(found, tuple(picture.layout for picture in probe.pictures))
    request = Request.of(probe.ids, pictures, family, source.shape, source.weights[family.embedding])
    budgets = {"all": sparse_feeds(request, recipe, token_share=1.0), "own": sparse_feeds(request, recipe)}
    feeds = {n: prefill_feeds(request) | b | kept_slots(request, b) for n, b in budgets.items()}
    prefill = graphs.run("prefill", feeds["all"])
    own = graphs.run("prefill", feeds["own"])
    if "kept_tokens" in own:  # slots that nobody needed are filled up, at mask 0
        graphs.chosen = own["kept_tokens"][own["kept_mask"] > 0]
    out["prefill"] = {n: v.astype(np.float32) for n, v in prefill.items() if n != "kept_tokens"}
    cache = {n: v for n, v in prefill.items() if n.startswith("present.")}
    words = probe.ids[~probe.is_image][:STEPS]
    logits = graphs.decode(request, cache, words)
    out["decode"] = {f"logits of step {i}": step.astype(np.float32) for i, step in enumerate(logits)}
    return out


class _Portable:
    """The bundle's own graphs."""

    chosen: np.ndarray | None = None

    def __init__(self, source: Source, family: Family, threads: int):
        self.source = source
        names = core_row_names(family, source.shape.layers)
        self.backend = Backend(source.graph, source.weights, threads, source.predictor, names, heads=source.shape.heads)

    def run(self, name: str, feeds: Feeds) -> Feeds:
        return run(self.backend.session(name), feeds)

    def decode(self, request: Request, cache: Feeds, words: np.ndarray) -> list[np.ndarray]:
        whole, every = CoreSet.whole(self.source.shape), np.arange(request.tokens, dtype=np.int32)
        row = Row(request, whole, Rows.of(cache), np.zeros(self.source.shape.vocab, np.float32), listed=every)
        return [step[None, None] for step in teacher_forced(self.backend, row, words.tolist())[1:]]


class _Exact:
    """The lowered graphs in float32, over the bundle's own weights."""

    chosen: np.ndarray | None = None

    def __init__(self, source: Source, target: Target, family: Family, threads: int):
        self.source, self.target, self.row_names = source, target, core_row_names(family, source.shape.layers)
        self.backend = Backend(
            lambda name: lowered(source, name, target, "fp32"), source.weights, threads, source.predictor
        )

    def run(self, name: str, feeds: Feeds) -> Feeds:
        return run(self.backend.session(name, rows_as_inputs=False), feeds)

    def decode(self, request: Request, cache: Feeds, words: np.ndarray) -> list[np.ndarray]:
        """Over a static cache, whose rows beyond the mask hold what must not be read."""
        shape, capacity, logits = self.source.shape, self.source.recipe.engine.capacity, []
        past = {name: static_rows(rows, capacity, fill=7) for name, rows in cache.items()}
        half = next(iter(past.values())).dtype
        gathered = CoreRows(self.source.weights, self.row_names).gather([CoreSet.whole(shape)])
        constant = {n: v.astype(half) for n, v in gathered.rows.items()}
        constant["core_bias"] = np.zeros((shape.layers, 1, shape.hidden), np.float32)
        ids = shape.ffn // listed_block(self.source.recipe, self.target)
        constant |= listed(every_neuron_listed(shape.layers, ids), [ids] * shape.layers)
        constant |= {f"core_slots.{i}": np.zeros(ids, np.int32) for i in range(shape.layers)}
        constant["core_thresholds"] = CoreSet.whole(shape).least[None]
        for i, word in enumerate(words):
            past = self.run("decode", step_feeds(request, int(word), i, capacity) | constant | _past(past))
            logits.append(past.pop("logits"))
        return logits


class _Half(_Exact):
    """The lowered graphs as the builder gets them, over the 16-bit weights."""

    def __init__(self, source: Source, target: Target, family: Family, folder: Path, threads: int):
        self.source, self.target, self.row_names = source, target, core_row_names(family, source.shape.layers)
        self._graphs = LoweredGraphs(source, target, folder, threads)

    def run(self, name: str, feeds: Feeds) -> Feeds:
        return self._graphs.run(name, feeds)


def _past(cache: Feeds) -> Feeds:
    return {n.replace("present", "past", 1): v for n, v in cache.items()}


def _choice(ours: np.ndarray | None, theirs: np.ndarray | None) -> Gate:
    same = 1.0
    if theirs is not None:
        same = 0.0 if ours is None else float(np.isin(ours, theirs).mean())
    return Gate("lowered choice", same, None, True, "share of the kept tokens that the portable graph keeps, too")


def _packing(source: Source, target: Target, folder: Path, bits: int) -> Gate:
    """Every packed weight, read back from the file that builders get, beside the weight that it stands for."""
    file, worst = WeightFile(folder / weight_file(source.recipe.engine.precision)), ("nothing is packed", -1.0)
    for graph in ("prefill", "decode"):
        _, parts = lowered_with_parts(source, graph, target)
        for name, part in parts.items():
            if part.kind == "codes":
                assert part.scheme is not None  # whose codes they are
                weight = source.weights[part.weight]
                error = relative_error(weight.T if part.turned else weight, file[name], file[part.scale], part.scheme)
                worst = max(worst, (part.weight, error), key=lambda pair: pair[1])
        source.weights.release()
    if not 0 <= worst[1] <= PACK_LIMIT[bits]:
        fix = "no engine was built; build with fp16, or check memory and disk"
        raise GateFailed(
            f"differs by {worst[1]:.1e} (limit {PACK_LIMIT[bits]})", where=f"gate 'packing', {worst[0]}", fix=fix
        )
    return Gate(
        "packing", worst[1], PACK_LIMIT[bits], True, f"int{bits} weights as written, relative, with the weights"
    )


def _same_neurons(ours: np.ndarray | None, theirs: np.ndarray | None, share: float) -> Gate:
    same = 1.0
    if theirs is not None:
        assert ours is not None  # the same output of the same graph
        a, b = (select_core_neurons(s, neuron_count(share, s.shape[-1])) for s in (ours, theirs))
        same = float(np.mean([np.isin(x, y).mean() for x, y in zip(a[:, 0], b[:, 0], strict=True)]))
    return Gate("half choice", same, None, True, "share of the core neurons that float32 chooses, too")


def _gate(name: str, graph: str, found: Answers, expected: Answers, limit: float | None, detail: str) -> Gate:
    pairs = paired(found[graph], expected[graph], f"lowered {graph}.onnx")
    fix = "no engine was built; please report this checkpoint's config.json"
    return compared(name, f"lowered {graph}.onnx", pairs, limit, detail, fix)
