"""Image tokens that the policy drops leave the prefill at layer l, and their rows leave the cache of every layer.

    layers 0..l-1 -> h [B,S,D] -> [gather keep] -> h' [B,T,D] -> layers l..L-1
                        |  score of layer l-1 -> keep [B,T]
    present.i (i < l)   -> [gather keep]

Whatever layers l.. read besides h (rotary tables, masks, sizes) is computed again from the gathered positions and the
gathered padding mask, so original positions are kept and causality holds because the order does. METHOD section 7.
"""

from types import ModuleType

import numpy as np
import onnx_graphsurgeon as gs

from .. import dims
from ..errors import SurgeryError
from ..policies import keep as keeping
from ..policies import vote as voting
from ..recipe import Tokens
from ..trace import cache_names
from .edit import Edit
from .find_sites import FFN


def choose_tokens(
    edit: Edit, policy: ModuleType, recipe: Tokens, ffns: list[FFN], attentions: list[gs.Node]
) -> tuple[gs.Variable, gs.Variable]:
    """Add the token policy after layer l-1; returns keep [B,T] int64 ascending and kept_mask [B,T] int64."""
    image_mask = edit.add_input("image_mask", bool, [dims.BATCH, dims.PROMPT])
    mask = edit.input("attention_mask")
    node = attentions[recipe.prune_layer - 1]
    wires = {"z": ffns[recipe.prune_layer - 1].z, "image_mask": image_mask, "embeds": edit.input("inputs_embeds")}
    wires |= dict(zip(("q", "k", "mask"), (node.inputs[0], node.inputs[1], node.inputs[3]), strict=True))
    if "vote" in policy.WIRES:
        wires["vote"] = edit.call(voting.FUNCTIONS[recipe.voters], image_mask, mask)[0]
    if "seed" in policy.WIRES:
        wires["seed"] = edit.add_input("seed", np.int64, [1])
    values = {"rho": recipe.rho, "beta": recipe.beta, "scale": node.attrs["scale"], "layer": recipe.prune_layer}
    score = edit.call(policy.FUNCTION, *(wires[w] for w in policy.WIRES), **{a: values[a] for a in policy.ATTRIBUTES})[
        0
    ]
    count = edit.add_input("image_keep", np.int64, [dims.BATCH])
    if recipe.budget == "knee":
        low, high = (edit.add_input(f"image_keep_{b}", np.int64, [dims.BATCH]) for b in ("low", "high"))
        count = edit.call(keeping.KNEE_COUNT, score, image_mask, low, high, count)[0]
    keep, kept_mask = edit.call(keeping.KEEP_TOKENS, score, image_mask, mask, count)
    return keep, kept_mask


def report_tokens(edit: Edit, keep: gs.Variable, kept_mask: gs.Variable) -> None:
    """Make the choice visible: outputs kept_tokens [B,T] int32 (original positions) and kept_mask [B,T] int64."""
    edit.add_output(edit.op("Cast", keep, to=6), "kept_tokens", np.int32, [dims.BATCH, dims.KEPT])
    edit.add_output(edit.op("Identity", kept_mask), "kept_mask", np.int64, [dims.BATCH, dims.KEPT])


def cut_tokens(
    edit: Edit, ffns: list[FFN], keep: gs.Variable, kept_mask: gs.Variable, layer: int, layers: int, kv: list[int]
) -> None:
    """Gather at the border of layer `layer`; `kv` = [Hk, d]. Raises SurgeryError if something crosses the border."""
    hidden = _layer_output(ffns[layer - 1])
    after = _downstream(hidden)
    row = edit.op("Unsqueeze", keep, edit.constant([-1], np.int64))  # [B,T,1]
    cut = edit.op("GatherND", hidden, row, batch_dims=1)
    positions = edit.op(
        "GatherND",
        edit.input("position_ids"),
        edit.op(
            "Expand", edit.op("Unsqueeze", row, edit.constant([0], np.int64)), edit.constant([3, 1, 1, 1], np.int64)
        ),
        batch_dims=2,
    )
    fresh = {"inputs_embeds": cut, "position_ids": positions, "attention_mask": kept_mask}
    memo: dict[int, gs.Tensor] = {}
    for node in after:
        for i, tensor in enumerate(node.inputs):
            if tensor is hidden:
                node.inputs[i] = cut
            elif not (tensor.inputs and id(tensor.inputs[0]) in {id(n) for n in after}):
                node.inputs[i] = _again(edit, tensor, fresh, memo)
    per_head = edit.op(
        "Expand", edit.op("Unsqueeze", row, edit.constant([1], np.int64)), edit.constant([1, kv[0], 1, 1], np.int64)
    )  # [B,Hk,T,1]
    outputs = {t.name: t for t in edit.graph.outputs}
    for i, name in enumerate(cache_names(layers, "present")):
        shape = [dims.BATCH, kv[0], dims.KEPT, kv[1]]
        if i < 2 * layer:
            edit.add_output(edit.op("GatherND", outputs[name], per_head, batch_dims=2), name, np.float32, shape)
        else:
            outputs[name].shape = shape


def _layer_output(ffn: FFN) -> gs.Tensor:
    """The hidden state after a layer: the residual sum that reads the FFN's y."""
    users = list(ffn.y.outputs)
    if len(users) != 1 or users[0].op != "Add":
        raise SurgeryError(f"y of layer {ffn.layer} feeds {[u.op for u in users]}, not one residual Add")
    return users[0].outputs[0]


def _downstream(tensor: gs.Tensor) -> list[gs.Node]:
    """Every node that depends on the tensor."""
    seen, todo = {}, list(tensor.outputs)
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            todo.extend(user for out in node.outputs for user in out.outputs)
    return list(seen.values())


def _again(edit: Edit, tensor: gs.Tensor, fresh: dict[str, gs.Tensor], memo: dict[int, gs.Tensor]) -> gs.Tensor:
    """The same computation from the cut inputs; tensors that depend on none of them are returned as they are."""
    if isinstance(tensor, gs.Constant):
        return tensor
    if not tensor.inputs:
        return fresh.get(tensor.name, tensor)
    if id(tensor) in memo:
        return memo[id(tensor)]
    node = tensor.inputs[0]
    if node.op in ("CoreFFN", "CoreAttention"):
        raise SurgeryError(f"{tensor.name} is computed before the cut and read after it", where=edit.graph.name)
    inputs = [_again(edit, t, fresh, memo) for t in node.inputs]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        outputs = list(node.outputs)
    else:
        outputs = [gs.Variable(f"{t.name}/kept", dtype=t.dtype) for t in node.outputs]
        edit.graph.nodes.append(
            gs.Node(node.op, f"{node.name}/kept", dict(node.attrs), inputs, outputs, domain=node.domain)
        )
    memo.update((id(a), b) for a, b in zip(node.outputs, outputs, strict=True))
    return memo[id(tensor)]
