"""What a neuron policy knows besides the prompt's activations: norms of the down rows, and a calibration's prior.

    row [L,F]          down_energy, where neurons.row_norm asks for it
    down_energy [L,F]  ||W_down[n]||^2, relative to the layer's mean
    prior [L,F]        share of activation energy in generated text

They are constants of the prefill graph (8 bytes per neuron), so that every runtime scores alike without being told.
"""

import numpy as np

from ..bundle.calibration import Calibration
from ..bundle.names import core_row_names
from ..bundle.weights import WeightFile
from ..families import Family, Shape
from ..recipe import facts
from ..recipe.recipe import Recipe


def neuron_constants(
    recipe: Recipe, weights: WeightFile, family: Family, shape: Shape, calibration: Calibration | None
) -> dict[str, np.ndarray]:
    """{wire: [L,F] float32} of what the recipe's policy reads; `calibration` in the order of `weights`."""
    policy = facts.neuron_policy(recipe.neurons.policy)
    out: dict[str, np.ndarray] = {}
    wires = {"down_energy"} | ({"row"} if recipe.neurons.row_norm else set())
    if asked := wires & set(policy.wires):
        norms = np.stack([_energy(weights[down]) for *_, down in core_row_names(family, shape.layers)])
        out |= dict.fromkeys(asked, norms)
    if "prior" in policy.wires:
        assert calibration is not None  # a recipe without one is refused where the policy reads it
        out["prior"] = calibration.energy
    return out


def _energy(down: np.ndarray, block: int = 1024) -> np.ndarray:
    """[F] float32 of W_down [F,D], read a block of rows at a time."""
    parts = [np.square(down[i : i + block].astype(np.float64)).sum(1) for i in range(0, len(down), block)]
    energy = np.concatenate(parts)
    return (energy / max(energy.mean(), 1e-300)).astype(np.float32)
