"""Image tokens that the policy drops leave the prefill at layer l, and their rows leave the cache of every layer.

    layers 0..l-1 -> h [B,S,D] -> [gather keep] -> h' [B,T,D] -> layers l..L-1
                        |  score of layer l-1 -> keep [B,T]
    present.i (i < l)   -> [gather keep]

Whatever layers l.. read besides h (rotary tables, masks, sizes) is computed again from the gathered positions and the
gathered padding mask, so original positions are kept and causality holds because the order does. METHOD section 7.
Cuts follow one another, each on the prompt that the one before it left; before the first layer, h is the embeddings.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..base.errors import SurgeryError
from .edit import Edit
from .find_sites import FFN


@dataclass(frozen=True)
class Prompt:
    """The prompt as layers see it between two cuts: the graph's inputs, or rows gathered from them."""

    inputs_embeds: gs.Tensor  # [B,T,D]
    position_ids: gs.Tensor  # [3,B,T]
    attention_mask: gs.Tensor  # [B,T] int64, 0 also for image tokens dropped before
    image_mask: gs.Tensor  # [B,T] bool
    picture: gs.Tensor | None  # [B,T] int64, where pictures have quotas of their own
    rows: gs.Tensor | None = None  # [B,T] int64: original positions of the columns; None: all S of them
    kept: gs.Tensor | None = None  # [B,S] int64: 1 where a token of the whole prompt is still there; None: all are


def leave_out(edit: Edit, prompt: Prompt, keep: gs.Tensor, kept_mask: gs.Tensor) -> Prompt:
    """The prompt after a choice that cuts nothing (cache "index"): dropped tokens are as padding for later choices."""
    nothing = edit.op("Mul", prompt.attention_mask, edit.constant(0, np.int64))
    kept = edit.op("ScatterElements", nothing, keep, kept_mask, axis=1)
    image = edit.op("And", prompt.image_mask, edit.op("Cast", kept, to=9))
    return replace(
        prompt, attention_mask=kept, image_mask=image, picture=_pictures(edit, prompt.picture, image), kept=kept
    )


def cut_tokens(
    edit: Edit, prompt: Prompt, ffns: list[FFN], keep: gs.Tensor, kept_mask: gs.Tensor, layer: int, kv: list[int]
) -> Prompt:
    """Gather at the border of layer `layer` (0: before the first) and return the prompt that is left; `kv` = [Hk, d].

    keep [B,T'] int64, ascending: columns of `prompt`. Raises SurgeryError if something crosses the border.
    """
    hidden = _layer_output(ffns[layer - 1]) if layer else prompt.inputs_embeds
    before = {id(n) for n in _upstream(keep)}
    after = [n for n in _downstream(hidden) if id(n) not in before]
    row = edit.op("Unsqueeze", keep, edit.constant([-1], np.int64))  # [B,T',1]
    cut = edit.op("GatherND", hidden, row, batch_dims=1)
    for_each_axis = edit.op(
        "Expand", edit.op("Unsqueeze", row, edit.constant([0], np.int64)), edit.constant([3, 1, 1, 1], np.int64)
    )
    positions = edit.op("GatherND", prompt.position_ids, for_each_axis, batch_dims=2)
    embeds = edit.op("GatherND", prompt.inputs_embeds, row, batch_dims=1) if layer else cut
    memo: dict[int, gs.Tensor] = {
        id(prompt.inputs_embeds): embeds,
        id(prompt.position_ids): positions,
        id(prompt.attention_mask): kept_mask,
    }
    later = {id(n) for n in after}
    for node in after:
        for i, tensor in enumerate(node.inputs):
            if tensor is hidden:
                node.inputs[i] = cut
            elif not (tensor.inputs and id(tensor.inputs[0]) in later):
                node.inputs[i] = _again(edit, tensor, memo)
    per_head = edit.op(
        "Expand", edit.op("Unsqueeze", row, edit.constant([1], np.int64)), edit.constant([1, kv[0], 1, 1], np.int64)
    )  # [B,Hk,T',1]
    outputs = {t.name: t for t in edit.graph.outputs}
    for i, name in enumerate(dims.cache_names(len(ffns), "present")):
        shape = [dims.BATCH, kv[0], dims.KEPT, kv[1]]
        if i < 2 * layer:
            edit.add_output(edit.op("GatherND", outputs[name], per_head, batch_dims=2), name, np.float32, shape)
        else:
            outputs[name].shape = shape
    image = edit.op("And", edit.op("GatherElements", prompt.image_mask, keep, axis=1), edit.op("Cast", kept_mask, to=9))
    picture = edit.op("GatherElements", prompt.picture, keep, axis=1) if prompt.picture is not None else None
    rows = keep if prompt.rows is None else edit.op("GatherElements", prompt.rows, keep, axis=1)
    nothing = edit.op("Mul", edit.input("attention_mask"), edit.constant(0, np.int64))
    return Prompt(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=kept_mask,
        image_mask=image,
        picture=_pictures(edit, picture, image),
        rows=rows,
        kept=edit.op("ScatterElements", nothing, rows, kept_mask, axis=1),
    )


def _pictures(edit: Edit, picture: gs.Tensor | None, image: gs.Tensor) -> gs.Tensor | None:
    """Dropped image tokens that only fill up a shorter row belong to no picture any more."""
    return None if picture is None else edit.op("Where", image, picture, edit.constant(-1, np.int64))


def _layer_output(ffn: FFN) -> gs.Tensor:
    """The hidden state after a layer: the residual sum that reads the FFN's y."""
    users = list(ffn.y.outputs)
    if len(users) != 1 or users[0].op != "Add":
        raise SurgeryError(f"y of layer {ffn.layer} feeds {[u.op for u in users]}, not one residual Add")
    return users[0].outputs[0]


def _downstream(tensor: gs.Tensor) -> list[gs.Node]:
    """Every node that depends on the tensor."""
    return _reached(tensor.outputs, lambda node: (user for out in node.outputs for user in out.outputs))


def _upstream(tensor: gs.Tensor) -> list[gs.Node]:
    """Every node that the tensor depends on."""
    return _reached(tensor.inputs, lambda node: (n for t in node.inputs for n in t.inputs))


def _reached(start: Iterable[gs.Node], onward: Callable[[gs.Node], Iterable[gs.Node]]) -> list[gs.Node]:
    seen, todo = {}, list(start)
    while todo:
        node = todo.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            todo.extend(onward(node))
    return list(seen.values())


def _again(edit: Edit, tensor: gs.Tensor, memo: dict[int, gs.Tensor]) -> gs.Tensor:
    """The same computation from the cut inputs, which `memo` names; what depends on none of them is returned as it is."""
    if id(tensor) in memo:
        return memo[id(tensor)]
    if not tensor.inputs:
        return tensor
    node = tensor.inputs[0]
    if node.op in ("CoreFFN", "CoreAttention"):
        raise SurgeryError(f"{tensor.name} is computed before the cut and read after it", where=edit.graph.name)
    inputs = [_again(edit, t, memo) for t in node.inputs]
    if all(a is b for a, b in zip(inputs, node.inputs, strict=True)):
        outputs = list(node.outputs)
    else:
        outputs = [gs.Variable(f"{t.name}/kept", dtype=t.dtype) for t in node.outputs]
        edit.graph.nodes.append(
            gs.Node(node.op, f"{node.name}/kept", dict(node.attrs), inputs, outputs, domain=node.domain)
        )
    memo.update((id(a), b) for a, b in zip(node.outputs, outputs, strict=True))
    return memo[id(tensor)]
