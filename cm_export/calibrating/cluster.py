"""An order of one layer's neurons in which those that are active together are neighbours, for selection in blocks.

    profile of neuron n = its energy at every generated token       [F,N]
    strongest neuron + the most similar free ones = a group of 8; two groups of 8 that are alike = 16; two of 16 = 32

Groups nest, so one order serves blocks of 8, 16 and 32. Reordering the neurons of an FFN changes nothing (METHOD 5).
"""

import numpy as np

GROUPS = (8, 16, 32)


def cluster(energy: np.ndarray) -> np.ndarray:
    """[F] int32, place -> id; energy [N,F] >= 0, one row per token. What fills no group comes last, by strength."""
    ffn = energy.shape[1]
    groups = [np.array([n]) for n in range(ffn)]
    rest: list[np.ndarray] = []
    size = 1
    for wanted in GROUPS:
        groups, left = _merge(energy, groups, wanted // size)
        rest = left + rest
        size = wanted
    return np.concatenate([*groups, *rest]).astype(np.int32) if groups or rest else np.zeros(0, np.int32)


def _merge(energy: np.ndarray, groups: list[np.ndarray], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Join `count` groups at a time: the strongest free one with those whose profile is most alike (cosine)."""
    if len(groups) < count:
        return [], groups
    profile = np.stack([energy[:, g].sum(1, dtype=np.float64) for g in groups])  # [groups,N]
    strength = profile.sum(1)
    profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-30)
    profile = profile.astype(np.float32)
    free, out = np.ones(len(groups), bool), []
    for first in np.argsort(-strength, kind="stable"):
        if not free[first] or free.sum() < count:
            continue
        alike = np.where(free, profile @ profile[first], -1)
        alike[first] = 2
        chosen = np.argsort(-alike, kind="stable")[:count]
        free[chosen] = False
        out.append(np.concatenate([groups[i] for i in chosen]))
    left = sorted(np.flatnonzero(free), key=lambda i: (-strength[i], i))
    return out, [groups[i] for i in left]
