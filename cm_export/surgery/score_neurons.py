"""The prefill reports how much the prompt needs each neuron: core_scores [L,B,F], from which the host picks any K.

z_i [B,S,F], token weights [B,S]  -> NeuronScore<policy> -> [B,F]  -> stacked over the layers
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..base.errors import SurgeryError
from ..policies import vote as voting
from ..recipe.recipe import Neurons
from .cut_tokens import Prompt
from .edit import Edit
from .find_sites import FFN


def token_weights(
    edit: Edit,
    recipe: Neurons,
    prompts: list[Prompt | None],
    chosen: Prompt | None,
    who: Callable[[Edit, gs.Variable], gs.Variable] | None = None,
) -> list[gs.Variable]:
    """How much each token's activations count, per layer [B,T]; `prompts`: what each layer sees, `chosen`: what stays
    (None: nothing is cut).

    counted "kept": the same tokens in all layers, those that stay. "all": every token that a layer sees; after a cut
    that is the kept ones again, so it differs in the layers before it, and everywhere with cache "index".
    `who`: from votes over the context to those of the rows at hand, if not all are.
    """
    image_mask = edit.add_input("image_mask", bool, [dims.BATCH, dims.PROMPT])
    votes = edit.call(voting.FUNCTIONS[recipe.voters], image_mask, edit.input("attention_mask"))[0]
    if recipe.image_weight != 1:
        image, text = (edit.constant(w, np.float32) for w in (recipe.image_weight, 1.0))
        votes = edit.op("Mul", votes, edit.op("Where", image_mask, image, text))
    if who:
        votes = who(edit, votes)
    if recipe.counted == "kept" and chosen is not None:
        votes = edit.op("Mul", votes, edit.op("Cast", chosen.kept, to=1))
    made: dict[int, gs.Variable] = {}
    for prompt in prompts:
        if prompt is not None and prompt.rows is not None and id(prompt) not in made:
            there = edit.op("Cast", prompt.attention_mask, to=1)  # rows that only fill up a batch do not count
            made[id(prompt)] = edit.op("Mul", edit.op("GatherElements", votes, prompt.rows, axis=1), there)
    return [made.get(id(prompt), votes) for prompt in prompts]


def score_neurons(
    edit: Edit,
    policy: ModuleType,
    recipe: Neurons,
    ffns: list[FFN],
    weights: list[gs.Variable],
    constants: dict[str, np.ndarray],
) -> None:
    """Add the scores of every layer; weights as from `token_weights`, constants {wire: [L,F]} (neuron_constants.py)."""
    ffn_size, scores = ffns[0].w_gate.shape[0], []
    for ffn, weight in zip(ffns, weights, strict=True):
        wires = {"z": ffn.z, "weight": weight}
        if "seed" in policy.WIRES:
            wires["seed"] = edit.add_input("seed", np.int64, [1])
        if "row" in policy.WIRES and not recipe.row_norm:
            wires["row"] = edit.constant([1], np.float32)
        for name in set(policy.WIRES) - set(wires):
            if name not in constants or constants[name].shape != (len(ffns), ffn_size):
                raise SurgeryError(f"the policy reads {name} [{len(ffns)},{ffn_size}], which is not given", where=name)
            wires[name] = edit.constant(constants[name][ffn.layer], np.float32)
        values = {"rho": recipe.rho, "mix": recipe.mix, "layer": ffn.layer}
        score = edit.call(
            policy.FUNCTION, *(wires[w] for w in policy.WIRES), **{a: values[a] for a in policy.ATTRIBUTES}
        )[0]
        scores.append(edit.op("Unsqueeze", score, edit.constant([0], np.int64)))
    edit.add_output(edit.op("Concat", *scores, axis=0), "core_scores", np.float32, [len(ffns), dims.BATCH, ffn_size])
