"""How many neurons each layer computes: the same in all, or more where leaving some out hurts more.

    sensitivity [L,P]: KL when only layer l keeps shares[p]   ->   K_l with sum K_l = L K and the least summed KL

The curves are made convex from below first, so that giving each next step of neurons to the layer that gains most is
optimal for their sum (marginal analysis, Fox 1966). It is a model: layers that are sparse together may add up otherwise.
"""

import heapq

import numpy as np

from ..base.core_index import neuron_count
from ..bundle.calibration import Calibration
from ..recipe.recipe import Neurons

STEP = 1 / 64  # of F: the smallest amount that one layer gets more than another
# Of the uniform budget, what every layer keeps however insensitive it was measured to be: curves of single layers say
# nothing of many layers cut to the bone together.
LEAST = 0.5


def layer_counts(neurons: Neurons, share: float, layers: int, ffn: int, calibration: Calibration | None) -> np.ndarray:
    """[L] int64: K_l, whole blocks, at least one each. Raises InputError for an impossible share."""
    block = neurons.block
    total = max(1, round(neuron_count(share, ffn) / block)) * layers
    if neurons.layers == "uniform" or total == layers * ffn // block:
        return np.full(layers, total // layers * block, np.int64)
    assert calibration is not None  # a recipe with calibrated budgets is refused without one
    return allot(calibration.sensitivity, calibration.shares, total, ffn // block) * block


def allot(sensitivity: np.ndarray, shares: np.ndarray, total: int, most: int) -> np.ndarray:
    """[L] int64 that sums to `total`, each 1..most: units given one step at a time to where the KL falls fastest."""
    step, layers = max(1, int(most * STEP)), len(sensitivity)
    least = max(1, int(total // layers * LEAST))
    curves = [_convex(np.append(shares, 1.0), np.append(row, 0.0)) for row in sensitivity.astype(np.float64)]
    counts = np.full(layers, least, np.int64)
    left = total - counts.sum()
    scale = max(float(curve[1].max()) for curve in curves) or 1.0

    def entry(layer: int) -> tuple[float, int, int]:
        grown = min(step, most - counts[layer])
        ends = np.array([counts[layer], counts[layer] + max(1, grown)]) / most
        fall = float(np.subtract(*np.interp(ends, *curves[layer]))) / max(1, grown)
        # Of layers that gain the same (up to rounding), the one with fewer neurons: equal curves get equal counts.
        return -round(fall / scale, 12), int(counts[layer]), layer

    heap = [entry(layer) for layer in range(layers)]
    heapq.heapify(heap)
    while left > 0:
        _, _, layer = heapq.heappop(heap)
        given = min(step, most - counts[layer], left)
        counts[layer] += given
        left -= given
        if counts[layer] < most:
            heapq.heappush(heap, entry(layer))
    return counts


def _convex(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greatest falling convex curve below the points, its first slope continued to x = 0."""
    y = np.minimum.accumulate(np.maximum(y, 0.0))
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    hx, hy = x[hull], y[hull]
    if len(hx) > 1 and hx[0] > 0:
        hx, hy = np.append(0.0, hx), np.append(hy[0] + (hy[0] - hy[1]) / (hx[1] - hx[0]) * hx[0], hy)
    return hx, hy
