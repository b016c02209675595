"""Every sparse FFN of decode adds what its dropped neurons gave on average: one vector per layer and request.

before: CoreFFN -> y        after: CoreFFN -> y_core;  y = y_core + core_bias[layer]        core_bias [L,B,D]
"""

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from .edit import Edit
from .find_sites import FFN


def add_bias(edit: Edit, ffns: list[FFN], hidden: int) -> int:
    """Add the input core_bias and one addition per layer; returns how many."""
    bias = edit.add_input("core_bias", np.float32, [len(ffns), dims.BATCH, hidden])
    for ffn in ffns:
        core = gs.Variable(f"ffn.{ffn.layer}.y_core", dtype=np.float32)
        node = ffn.y.inputs[0]
        node.outputs[0] = core
        one = edit.op("Gather", bias, edit.constant(ffn.layer, np.int64), axis=0)  # [B,D]
        row = edit.op("Unsqueeze", one, edit.constant([1], np.int64))
        edit.graph.nodes.append(gs.Node("Add", f"ffn.{ffn.layer}.fill", inputs=[core, row], outputs=[ffn.y]))
    return len(ffns)


def report_means(edit: Edit, ffns: list[FFN], weights: list[gs.Variable], hidden: int) -> int:
    """Prefill's outputs core_mean_z [L,B,F] and core_mean_y [L,B,D]: weighted means over the tokens that vote.

    weights: per layer [B,S] float32. y = z W_down is linear, so mean_y = mean_z W_down up to rounding.
    """
    ffn_size = ffns[0].w_gate.shape[0]
    tiny = edit.constant(1e-30, np.float32)
    rows: dict[int, gs.Variable] = {}
    for w in weights:
        if id(w) not in rows:
            total = edit.op("ReduceSum", w, edit.constant([1], np.int64), keepdims=1)
            share = edit.op("Div", w, edit.op("Max", total, tiny))
            rows[id(w)] = edit.op("Unsqueeze", share, edit.constant([1], np.int64))  # [B,1,S]
    for name, size, part in (("core_mean_z", ffn_size, "z"), ("core_mean_y", hidden, "y")):
        means = [edit.op("MatMul", rows[id(w)], getattr(f, part)) for f, w in zip(ffns, weights, strict=True)]
        stacked = edit.op("Concat", *means, axis=1)  # [B,L,..]
        edit.add_output(edit.op("Transpose", stacked, perm=[1, 0, 2]), name, np.float32, [len(ffns), dims.BATCH, size])
    return len(ffns)
