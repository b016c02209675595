"""What a decoded token reads of the weights, in bits for each weight: the cost that quality is drawn against.

    bits read per weight = 8 * bytes of a step / (Shape.weights + D)              float32, dense: 32

    packed products     counted by the native library while they run
    other products      bits of their weights x the share that decode reads: neurons of a set, with the copies that choose
                        them, or the channels above thresholds, as many as there were when these were measured
    embedding           one row [D], as it is stored

One function for bench, eval, tune and report. Cache and pictures are counted apart: they grow with the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..bundle.packed import Packed
from ..bundle.predictor import copy_bytes
from ..bundle.thresholds import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT, SIDES
from ..families import Shape
from ..host.backend import DEFAULT
from ..host.core_set import CoreSet
from ..host.runner import Prefilled, Runner
from ..plugins.cpu import library as native
from ..quant.precision import PRECISIONS
from ..quant.remainder import row_bytes
from ..quant.rows import PANEL


@dataclass(frozen=True)
class WeightsRead:
    """Of one step, on average. `exact`: what was read; else what the policy needs, of which this runtime reads more."""

    bytes: float
    weights: int
    exact: bool

    @property
    def bits(self) -> float:
        """Bits read for each weight that a dense step reads."""
        return 8 * self.bytes / self.weights


class Steps:
    """What the native library has counted between two moments; ask `per_step` afterwards."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self._counts = runner.bundle.packed is not None and runner.backend.name == DEFAULT and native.find() is not None
        self._bytes = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Everything that runs in here is a step of decode, of one request."""
        if self._counts:
            native.reset()
        yield
        if self._counts:
            self._bytes = native.counts()[0]

    def per_step(self, prefilled: Prefilled, steps: int) -> WeightsRead:
        """Of `steps` steps; of none, what one would be expected to read."""
        packed, others, masked = _expected(self._runner, prefilled.core_set, prefilled.budget.dense)
        counted = self._counts and steps > 0
        # Masked channels of a product that the library does not run are multiplied all the same.
        exact = not masked if counted else not masked and not packed
        return _read(self._runner, (self._bytes / steps if counted else packed) + others, exact)


def of_dense(runner: Runner) -> WeightsRead:
    """What a step of the dense model reads, as its weights are stored."""
    packed, others, _ = _expected(runner, CoreSet.whole(runner.bundle.shape), dense=True)
    return _read(runner, packed + others, exact=True)


def _read(runner: Runner, products: float, exact: bool) -> WeightsRead:
    """What the products read, and a row of the embedding."""
    shape, packed = runner.bundle.shape, runner.bundle.packed
    row = 4.0 * shape.hidden
    if packed is not None and runner.backend.name == DEFAULT and (name := packed.table_entry):
        entry = packed.entries[name]
        row = _entry_bytes(packed, name, 1.0) / (entry.panels * PANEL)
        row += row_bytes(entry.inputs) if entry.refined else 0
    return WeightsRead(products + row, counted_weights(shape), exact)


def counted_weights(shape: Shape) -> int:
    """Weights that a dense step reads: of the products, and a row of the embedding."""
    return shape.weights + shape.hidden


def _expected(runner: Runner, core: CoreSet, dense: bool) -> tuple[float, float, bool]:
    """Bytes of packed products and of all others; whether any of the others leave something out by masking it."""
    bundle, neurons, shape = runner.bundle, runner.recipe.neurons, runner.bundle.shape
    sizes, shares = site_sizes(shape), np.ones(SIDES * shape.layers + 1)
    in_sets = not dense and neurons.policy != "dense" and not neurons.by_threshold
    if core.shares is not None:
        shares = core.shares
    elif in_sets:
        for side in (FFN_IN, FFN_OUT):
            shares[side : SIDES * shape.layers : SIDES] = core.counts / shape.ffn
    copies = copy_bytes(shape) if in_sets and neurons.in_decode else 0.0
    if runner.backend.name != DEFAULT:
        return 0.0, float(_engine_bits(runner, len(sizes)) / 8 @ (sizes * shares)) + copies, False
    packed, left = 0.0, sizes.astype(np.float64)
    if bundle.packed is not None:
        for name, entry in bundle.packed.entries.items():
            # Rows of a set come from the float32 weights; the tower is no part of decode.
            if entry.site is None or (in_sets and name.endswith((".ffn_in", ".ffn_out"))):
                continue
            packed += _entry_bytes(bundle.packed, name, float(shares[entry.site]))
            left[entry.site] -= entry.inputs * sum(entry.outputs)
    masked = copies > 0 or bool((left * (1 - shares) > 0).any() and core.shares is not None)
    return packed, 4 * float(left @ shares) + copies, masked


def site_sizes(shape: Shape) -> np.ndarray:
    """[4L+1]: weights of the products at each site (bundle/thresholds.py); together Shape.weights."""
    of_layer = np.zeros(SIDES, np.int64)
    of_layer[[FFN_IN, FFN_OUT]] = 2 * shape.ffn * shape.hidden, shape.ffn * shape.hidden
    heads = shape.heads + 2 * shape.kv_heads, shape.heads
    of_layer[[ATTENTION_IN, ATTENTION_OUT]] = [n * shape.head_dim * shape.hidden for n in heads]
    return np.append(np.tile(of_layer, shape.layers), shape.vocab * shape.hidden)


def _entry_bytes(packed: Packed, name: str, share: float) -> float:
    """Of a packed matrix of which a share of the inputs is read: their codes, and scales and zeros of groups with any.

    What is read of a remainder, that of a few outputs, is known once it is counted.
    """
    entry, tensors = packed.entries[name], packed.file.tensors
    codes = tensors[f"{name}.codes"].length / entry.rows * entry.inputs
    scales = tensors[f"{name}.scale"].length + tensors[f"{name}.zero"].length
    return share * codes + (1 - (1 - share) ** entry.group) * scales


def _engine_bits(runner: Runner, sites: int) -> np.ndarray:
    """[4L+1]: bits of a weight in an engine, scales included."""
    precision = PRECISIONS[runner.bundle.recipe.engine.precision]
    bits = np.full(sites, 8.0 * precision.products.itemsize)
    stored = precision.weights
    if stored is not None:
        sides = range(SIDES) if precision.packs == "layers" else (FFN_IN, FFN_OUT)
        for side in sides:
            bits[side : sites - 1 : SIDES] = stored.bits_per_weight
    return bits
