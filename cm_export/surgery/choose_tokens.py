"""Which tokens stay, decided inside the prefill: scores of the token policy, a budget, and the choice, before any cut.

layer l-1 (z, q, k, v) -> score [B,T] -> (knee) -> count [B] -> keep [B,T'], kept_mask [B,T']
                                         (quota per picture: counts [B,C])
"""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..policies import keep as keeping
from ..policies import quota as quotas
from ..policies import vote as voting
from ..recipe.recipe import BEFORE_LAYERS, Tokens
from .cut_tokens import Prompt
from .edit import Edit
from .find_sites import FFN


def whole_prompt(edit: Edit, recipe: Tokens) -> Prompt:
    """The prompt before any choice: the graph's inputs, image_mask added to them."""
    image_mask = edit.add_input("image_mask", bool, [dims.BATCH, dims.PROMPT])
    embeds, positions, mask = (edit.input(n) for n in ("inputs_embeds", "position_ids", "attention_mask"))
    # Which picture a token belongs to is known to the host alone: two of them may stand side by side.
    picture = edit.add_input("picture", np.int64, image_mask.shape) if recipe.quota == "each" else None
    return Prompt(embeds, positions, mask, image_mask, picture)


def choose_tokens(
    edit: Edit,
    policy: ModuleType,
    recipe: Tokens,
    prompt: Prompt,
    layer: int,
    ffns: list[FFN],
    attentions: list[gs.Node],
    who: Callable[[Edit, gs.Variable], gs.Variable] | None = None,
) -> tuple[gs.Variable, gs.Variable]:
    """Add the token policy at the border of layer `layer`; returns keep [B,T] int64, ascending columns of `prompt`, and
    kept_mask [B,T] int64. Layer 0: before the first layer, where the budget is `first_share`.

    `who`: from the voters' rule over the context to the votes of the rows whose queries are at hand, if not of all.
    recipe.layers "all": the scores of every layer before the border are added, not those of the last one taken alone.
    """
    wires = {"image_mask": prompt.image_mask, "embeds": prompt.inputs_embeds}
    values = {"rho": recipe.rho, "beta": recipe.beta, "layer": layer}
    if "vote" in policy.WIRES:
        votes = edit.call(voting.FUNCTIONS[recipe.voters], prompt.image_mask, prompt.attention_mask)[0]
        wires["vote"] = who(edit, votes) if who else votes
    if "seed" in policy.WIRES:
        wires["seed"] = edit.add_input("seed", np.int64, [1])
    # What reads nothing of a layer says the same at each.
    depends = not set(policy.WIRES) <= BEFORE_LAYERS
    scores = []
    for i in range(0 if recipe.layers == "all" and depends else layer - 1, layer) if layer else (None,):
        if i is not None:
            node = attentions[i]
            wires |= {"z": ffns[i].z} | dict(zip(("q", "k", "v", "mask"), node.inputs, strict=True))
            values["scale"] = node.attrs["scale"]
        chosen = {a: values[a] for a in policy.ATTRIBUTES}
        scores.append(edit.call(policy.FUNCTION, *(wires[w] for w in policy.WIRES), **chosen)[0])
    score = scores[0]
    for other in scores[1:]:
        score = edit.op("Add", score, other)
    each = recipe.quota == "each"
    shape = [dims.BATCH, dims.PICTURES] if each else [dims.BATCH]
    count = edit.add_input("image_keep" if layer else "image_keep_first", np.int64, shape)
    if recipe.budget == "knee" and layer:
        count = _knee(edit, recipe, prompt, score, count, shape)
    if each:
        score, count = edit.call(quotas.QUOTA, score, prompt.picture, count)
    keep, kept_mask = edit.call(keeping.KEEP_TOKENS, score, prompt.image_mask, prompt.attention_mask, count)
    return keep, kept_mask


def _knee(
    edit: Edit, recipe: Tokens, prompt: Prompt, score: gs.Tensor, fallback: gs.Tensor, shape: list
) -> gs.Variable:
    low, high = (edit.add_input(f"image_keep_{b}", np.int64, shape) for b in ("low", "high"))
    confidence = edit.constant([round(1000 * recipe.knee_confidence)], np.int64)
    mask = prompt.image_mask
    if recipe.quota == "each":  # a curve for each picture
        mask = edit.op("And", edit.call(quotas.PICTURE_MASKS, prompt.picture, fallback)[0], _row(edit, mask))
        score = _row(edit, score)
    return edit.call(keeping.KNEE_COUNT, score, mask, low, high, fallback, confidence)[0]


def _row(edit: Edit, tensor: gs.Tensor) -> gs.Variable:
    return edit.op("Unsqueeze", tensor, edit.constant([1], np.int64))


def report_tokens(edit: Edit, keep: gs.Variable, kept_mask: gs.Variable) -> None:
    """Make the choice visible: outputs kept_tokens [B,T] int32 (original positions) and kept_mask [B,T] int64."""
    edit.add_output(edit.op("Cast", keep, to=6), "kept_tokens", np.int32, [dims.BATCH, dims.KEPT])
    edit.add_output(edit.op("Identity", kept_mask), "kept_mask", np.int64, [dims.BATCH, dims.KEPT])
