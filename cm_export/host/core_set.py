"""From what a prefill measured to what decode reads: which neurons of each layer, and what stands in for the others.

    core_scores [L,B,F] -> K_l best (neurons, or blocks) -> core_neurons [L,B,K] + core_counts [L] -> rows [B,K_l,D]
    core_bias [L,B,D]   =  mean_y - sum over kept n of mean_z_n W_down[n]      the mean of what the dropped ones gave

The means are the prompt's own (fill = "prompt", exact: both come from its prefill) or the calibration's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.core_index import check_core_neurons, select_core_neurons
from ..bundle.calibration import Calibration
from ..recipe import facts
from ..recipe.recipe import Neurons
from .layer_budgets import layer_counts
from .request import Request

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CoreSet:
    """core_neurons [L,B,max K_l] int32, the first counts[l] of each row count (-1 behind them); means for the bias.

    Where the decode graph chooses for every token there are no neurons to name (None), only how many.
    """

    neurons: np.ndarray | None
    counts: np.ndarray  # [L] int64
    ffn: int
    mean_z: np.ndarray | None  # [L,B,F]
    mean_y: np.ndarray | None  # [L,B,D]

    def constants(self, rows: Any) -> Arrays:
        """The inputs of decode that stay for the whole answer, rows gathered; `rows`: the backend's."""
        if self.neurons is None or (self.counts == self.ffn).all():
            return every_neuron(rows) | {"core_counts": self.counts}
        check_core_neurons(self.neurons, *self.neurons.shape[:2], self.ffn, self.counts)
        out = rows.gather(self.neurons, self.counts)
        out["core_neurons"], out["core_counts"] = self.neurons, self.counts
        out["core_bias"] = np.zeros((*self.neurons.shape[:2], rows.sources[0][2].shape[1]), np.float32)
        if self.mean_z is not None:
            ids = enumerate(zip(self.neurons, self.counts, strict=True))
            out["core_bias"] = self.bias([rows.down(i, out, index[:, :count]) for i, (index, count) in ids])
        return out

    def bias(self, down: list[np.ndarray]) -> np.ndarray:
        """[L,B,D] float32 of the kept neurons' down rows [B,K_l,D]; zero without means, and in a layer that keeps all."""
        out = np.zeros((*self.neurons.shape[:2], down[0].shape[-1]), np.float32)
        for layer, (count, kept) in enumerate(zip(self.counts, down, strict=True)):
            if self.mean_z is not None and count < self.ffn:
                ids = self.neurons[layer, :, :count].astype(np.int64)
                z = np.take_along_axis(self.mean_z[layer], ids, axis=-1)
                out[layer] = self.mean_y[layer] - (z[:, None] @ kept)[:, 0]
        return out


def choose(
    outputs: Arrays, neurons: Neurons, shape: Any, calibration: Calibration | None, share: float | None = None
) -> CoreSet:
    """The core set of a prefill's outputs (numpy) under a recipe's [neurons]. Raises InputError.

    `share` replaces the recipe's. Without scores (policy "dense") every neuron is kept.
    """
    scores = outputs.get("core_scores")
    if neurons.in_decode:
        counts = layer_counts(neurons, share or neurons.share, shape.layers, shape.ffn, calibration)
        return CoreSet(None, counts, shape.ffn, None, None)
    if scores is None:
        every = np.arange(shape.ffn, dtype=np.int32)
        counts = np.full(shape.layers, shape.ffn, np.int64)
        return CoreSet(np.array(np.broadcast_to(every, (shape.layers, 1, shape.ffn))), counts, shape.ffn, None, None)
    counts = layer_counts(neurons, share or neurons.share, shape.layers, shape.ffn, calibration)
    index = select_core_neurons(scores, counts if len(set(counts.tolist())) > 1 else int(counts[0]), neurons.block)
    mean_z, mean_y = None, None
    if neurons.fill == "prompt":
        mean_z, mean_y = outputs["core_mean_z"], outputs["core_mean_y"]
    elif neurons.fill == "calibrated":
        batch = scores.shape[1]
        mean_z, mean_y = (np.repeat(a[:, None], batch, axis=1) for a in (calibration.mean_z, calibration.mean_y))
    return CoreSet(index, counts, shape.ffn, mean_z, mean_y)


def together(before: Arrays, fresh: Arrays, context: Request, kept: np.ndarray, new: int, neurons: Neurons) -> Arrays:
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


def every_neuron(rows: Any) -> Arrays:
    """Every neuron: rows are views of the weight file, nothing is left to stand in for."""
    out = rows.all()
    layers, hidden = len(rows.sources), rows.sources[0][2].shape[1]
    out["core_bias"] = np.zeros((layers, 1, hidden), np.float32)
    out["core_counts"] = np.full(layers, len(rows.sources[0][0]), np.int64)
    return out
