"""Decode of the policy `predicted`: a graph that chooses its neurons, with shapes that no data decides.

    count = core_counts[l]          ->  count = length of core_slots.l [K] x block      an input whose values nobody reads
    ids in ascending order          ->  ids as TopK gives them                          CoreFFN takes any order

TopK takes up to TOP of them, so wider lists need blocks of neighbours (neurons.block).
"""

import numpy as np

from ...policies.choose_neurons import chooser
from ...surgery.edit import Edit
from .quantize import CHOSEN

SLOTS = "core_slots"
TOP = 3840  # TensorRT's largest k


def choose(edit: Edit, activation: str) -> None:
    """Every chooser counts by the length of an input of its own."""
    body = chooser("ChooseNeurons", activation, order="best")
    for node in [n for n in edit.graph.nodes if n.op == "PredictNeurons"]:
        reader = node.outputs[0].outputs[0]
        layer, block = reader.attrs["layer"], node.attrs["block"]
        slots = edit.add_input(f"{SLOTS}.{layer}", np.int32, [f"{SLOTS}.{layer}"])
        *given, _ = node.inputs
        count = edit.op("Mul", edit.op("Shape", slots), edit.constant([block], np.int64))
        chosen = edit.call(body, *given, count, **node.attrs)[0]
        chosen.name = f"{CHOSEN}{layer}"
        reader.inputs[4] = chosen
        node.outputs.clear()
