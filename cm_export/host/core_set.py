"""From what a prefill measured to what decode reads: which neurons of each layer, and what stands in for the others.

    core_scores [L,1,F] -> K_l best (neurons, or blocks) -> core_neurons [L,K] + counts [L] -> rows [K_l,D]
    bias [L,D]          =  mean_y - sum over kept n of mean_z_n W_down[n]      the mean of what the dropped ones gave

The means are the prompt's own (fill = "prompt", exact: both come from its prefill) or the calibration's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..base.core_index import check_core_neurons, select_core_neurons
from ..base.errors import InputError
from ..bundle.calibration import Calibration
from ..bundle.thresholds import FFN_OUT, SIDES, Thresholds
from ..families import Arrays, Shape
from ..recipe import facts
from ..recipe.recipe import LEAST_ACTIVE, Neurons
from .layer_budgets import layer_counts
from .request import Request


@dataclass(frozen=True, eq=False)
class CoreSet:
    """The core neurons of one request: core_neurons [L,1,max K_l] int32, of which the first counts[l] of layer l count.

    Behind them stands -1. Where the decode graph chooses for every token there are no neurons to name (None), only counts.
    """

    neurons: np.ndarray | None
    counts: np.ndarray  # [L] int64
    ffn: int
    mean_z: np.ndarray | None = None  # [L,1,F]
    mean_y: np.ndarray | None = None  # [L,1,D]
    thresholds: np.ndarray | None = None  # [4L+1] float32, for channels; counts are those expected then
    read: float = 1.0  # with thresholds, the share of the weights of all products that is expected to be read
    shares: np.ndarray | None = (
        None  # [4L+1] with thresholds: of its channels, those that each site is expected to read
    )

    def __post_init__(self) -> None:
        """Raises InputError for ids that are not ascending, distinct and in range."""
        if self.neurons is not None:
            check_core_neurons(self.neurons, len(self.counts), 1, self.ffn, self.counts)

    @classmethod
    def whole(cls, shape: Shape) -> CoreSet:
        """Every neuron of every layer."""
        ids = np.broadcast_to(np.arange(shape.ffn, dtype=np.int32), (shape.layers, 1, shape.ffn))
        return cls(ids, np.full(shape.layers, shape.ffn, np.int64), shape.ffn)

    def with_layer(self, layer: int, ids: np.ndarray) -> CoreSet:
        """The same with other neurons, [K] int32, in one layer; without means."""
        counts = self.counts.copy()
        counts[layer] = len(ids)
        neurons = np.full((len(counts), 1, int(counts.max())), -1, np.int32)
        for i in range(len(counts)):
            neurons[i, 0, : counts[i]] = ids if i == layer else self.of_layer(i)
        return CoreSet(neurons, counts, self.ffn)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return bool((self.counts == self.ffn).all())

    @property
    def chosen_in_decode(self) -> bool:
        """Whether the graph decides, anew for every token."""
        return self.neurons is None

    def of_layer(self, layer: int) -> np.ndarray:
        """[K_l] int32, ascending; all of them where the graph chooses."""
        count = int(self.counts[layer])
        return np.arange(count, dtype=np.int32) if self.neurons is None else self.neurons[layer, 0, :count]

    @property
    def least(self) -> np.ndarray:
        """[4L+1] float32: its thresholds; without them zeros, since nothing weighs less."""
        return np.zeros(SIDES * len(self.counts) + 1, np.float32) if self.thresholds is None else self.thresholds

    def bias(self, down: Sequence[np.ndarray]) -> np.ndarray:
        """[L,D] float32 from every layer's down rows [F,D]; zero without means, and in a layer that keeps all."""
        out = np.zeros((len(down), down[0].shape[-1]), np.float32)
        if self.mean_z is None or self.mean_y is None:
            return out
        for layer, rows in enumerate(down):
            if self.counts[layer] < self.ffn:
                ids = self.of_layer(layer)
                out[layer] = self.mean_y[layer, 0] - self.mean_z[layer, 0, ids] @ rows[ids]
        return out


def padded(lists: Sequence[Sequence[np.ndarray]], block: int) -> np.ndarray:
    """[L,B,K] int32 of lists of neurons, by layer and request: -1, which lists nothing, behind those that are shorter.

    `block`: of so many neighbours, which are listed together, one id stands for all: the first, divided.
    """
    most = max(len(ids) for layer in lists for ids in layer) // block
    out = np.full((len(lists), len(lists[0]), most), -1, np.int32)
    for layer, of_layer in enumerate(lists):
        for row, ids in enumerate(of_layer):
            out[layer, row, : len(ids) // block] = ids[::block] // block
    return out


def choose(
    outputs: Arrays,
    neurons: Neurons,
    shape: Shape,
    calibration: Calibration | None,
    share: float | None = None,
    thresholds: Thresholds | None = None,
) -> CoreSet:
    """The core set of a prefill's outputs (numpy) under a recipe's [neurons]. Raises InputError.

    `share` replaces the recipe's. Without scores (policy "dense") every neuron is kept. `thresholds`: of a policy that
    compares with them.
    """
    if neurons.by_threshold:
        return _above(neurons, shape, share, thresholds)
    scores = outputs.get("core_scores")
    if scores is None and not neurons.in_decode:
        return CoreSet.whole(shape)
    counts = layer_counts(neurons, share or neurons.share, shape.layers, shape.ffn, calibration)
    if scores is None or neurons.in_decode:
        return CoreSet(None, counts, shape.ffn)
    index = select_core_neurons(scores, counts if len(set(counts.tolist())) > 1 else int(counts[0]), neurons.block)
    mean_z, mean_y = None, None
    if neurons.fill == "prompt":
        mean_z, mean_y = outputs["core_mean_z"], outputs["core_mean_y"]
    elif neurons.fill == "calibrated" and calibration is not None:
        mean_z, mean_y = calibration.mean_z[:, None], calibration.mean_y[:, None]
    return CoreSet(index, counts, shape.ffn, mean_z, mean_y)


def _above(neurons: Neurons, shape: Shape, share: float | None, table: Thresholds | None) -> CoreSet:
    """Thresholds for a share of the FFNs' weights; what the other products leave out shrinks and grows with it."""
    if table is None or table.layers != shape.layers:
        fix = "build with --neurons active, or with a --calibration that measured thresholds"
        raise InputError("no thresholds were measured for this bundle", where="policy active", fix=fix)
    wanted = neurons.share if share is None else share
    left_out = (1 - wanted) / (1 - neurons.share) if neurons.share < 1 else float(wanted < 1)
    rest = min(1.0, max(LEAST_ACTIVE, 1 - (1 - neurons.rest_share) * left_out))
    if wanted < LEAST_ACTIVE:
        what, fix = f"a share of {wanted:g}", f"give {LEAST_ACTIVE} or more: nothing was measured below"
        raise InputError(what, where="policy active", fix=fix)
    shares = table.shares(wanted, rest)
    of_z = shares[FFN_OUT : SIDES * shape.layers : SIDES]
    counts = np.clip(np.rint(of_z * shape.ffn), 1, shape.ffn).astype(np.int64)
    read = float(np.average(shares, weights=table.sizes))
    return CoreSet(None, counts, shape.ffn, thresholds=table.at(shares), read=read, shares=shares)


def combined(before: Arrays, fresh: Arrays, context: Request, kept: np.ndarray, new: int, neurons: Neurons) -> Arrays:
    """What is measured of a conversation, from `before` of its context and `fresh` of the `new` tokens after it.

    Scores that are sums over tokens (a policy with ADDS) add up, so all turns judge, exactly as if the whole were one
    prompt (with counted = "kept", image tokens count as they were `kept` for the first question); means are weighed by
    how many tokens each stands for. Other scores, and those of voters "last", are the new text's alone.
    """
    fresh = {n: v for n, v in fresh.items() if n.startswith("core_")}
    if neurons.voters == "last" or not facts.neuron_policy(neurons.policy).adds:
        return fresh
    image = context.is_image[0]
    votes = np.where(image, np.float32(neurons.image_weight), 1)
    if neurons.voters == "text" and image.any():
        votes = np.where(np.arange(len(votes)) > np.flatnonzero(image)[-1], votes, 0)
    votes = votes[kept[0]] if neurons.counted == "kept" else votes
    part = new / (votes.sum() + new)
    for name, value in fresh.items():
        parts = (1, 1) if name == "core_scores" else (1 - part, part)
        fresh[name] = (parts[0] * before[name] + parts[1] * value).astype(np.float32)
    return fresh
