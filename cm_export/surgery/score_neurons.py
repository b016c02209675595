"""The prefill reports how much the prompt needs each neuron: core_scores [L,B,F], from which the host picks any K.

z_i [B,S,F], token weights [B,S]  -> NeuronScore<policy> -> [B,F]  -> stacked over the layers
"""

from types import ModuleType

import numpy as np
import onnx_graphsurgeon as gs

from .. import dims
from ..policies import vote as voting
from ..recipe import Neurons
from .edit import Edit
from .find_sites import FFN


def score_neurons(
    edit: Edit, policy: ModuleType, recipe: Neurons, ffns: list[FFN], cut: tuple[gs.Variable, gs.Variable, int] | None
) -> None:
    """Add the scores of every layer. `cut` = (keep, kept_mask, prune layer): only kept tokens count, in all layers."""
    image_mask = edit.add_input("image_mask", bool, [dims.BATCH, dims.PROMPT])
    votes = edit.call(voting.FUNCTIONS[recipe.voters], image_mask, edit.input("attention_mask"))[0]
    before = after = votes
    border = 0
    if cut is not None:
        keep, kept_mask, border = cut
        kept = edit.op("Cast", kept_mask, to=1)
        after = edit.op("Mul", edit.op("GatherElements", votes, keep, axis=1), kept)
        zeros = edit.op("Mul", votes, edit.constant(0, np.float32))
        before = edit.op("ScatterElements", zeros, keep, after, axis=1)
    scores = []
    for ffn in ffns:
        wires = {"z": ffn.z, "weight": before if ffn.layer < border else after}
        if "seed" in policy.WIRES:
            wires["seed"] = edit.add_input("seed", np.int64, [1])
        values = {"rho": recipe.rho, "layer": ffn.layer}
        score = edit.call(
            policy.FUNCTION, *(wires[w] for w in policy.WIRES), **{a: values[a] for a in policy.ATTRIBUTES}
        )[0]
        scores.append(edit.op("Unsqueeze", score, edit.constant([0], np.int64)))
    ffn_size = ffns[0].w_gate.shape[0]
    edit.add_output(edit.op("Concat", *scores, axis=0), "core_scores", np.float32, [len(ffns), dims.BATCH, ffn_size])
