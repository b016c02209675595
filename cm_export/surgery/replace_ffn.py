"""Every decoder FFN becomes one CoreFFN node.

before: x -> MatMul(Wg) -> act -+-> Mul -> MatMul(Wd) -> y        after: x, Wg, Wu, Wd_t[, core_neurons] -> CoreFFN -> y, z
        x -> MatMul(Wu) --------+
"""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..families import Family
from ..plugins.core_ffn.op import OP
from .edit import Edit
from .find_sites import FFN, ffn_sites


def replace_ffn(
    edit: Edit,
    family: Family,
    layers: int,
    activation: str,
    indexed: bool,
    counted: bool = False,
    predicted: Callable[[FFN], gs.Variable] | None = None,
    active: Callable[[FFN], list[gs.Tensor]] | None = None,
) -> list[FFN]:
    """Rewrite all layers; the returned sites carry the new node's z. `indexed`: rows named by core_neurons [L,B,K].

    `counted`: layers differ in K, so only the first core_counts[l] ids of a row are read.
    `predicted`: makes the rows [B,N,K] of a site inside the graph, one set for every token; instead of `indexed`.
    `active`: makes the norms and thresholds of a site (form "active"); instead of both.
    """
    sites = ffn_sites(edit, family, layers)
    index_form = "active" if active else "token" if predicted else "request" if indexed else "none"
    form = {"index": index_form, "activation": activation}
    index = edit.add_input("core_neurons", np.int32, [layers, dims.BATCH, dims.CORE_NEURONS]) if indexed else None
    counts = edit.add_input("core_counts", np.int64, [layers]) if counted else None
    out = []
    for s in sites:
        rows: list[gs.Tensor] = active(s) if active else [predicted(s)] if predicted else []
        s.y.inputs.clear()
        z = gs.Variable(f"ffn.{s.layer}.z", dtype=np.float32)
        if indexed:
            rows = [edit.op("Gather", index, edit.constant(s.layer, np.int64), axis=0)]
        if counted:
            end = edit.op("Gather", counts, edit.constant([s.layer], np.int64), axis=0)
            rows = [edit.op("Slice", *rows, edit.constant([0], np.int64), end, edit.constant([1], np.int64))]
        edit.core_node(
            OP,
            form,
            f"ffn.{s.layer}",
            s.layer,
            [s.x, s.w_gate, s.w_up, s.w_down_t, *rows],
            [s.y, z],
            activation=activation,
            block=1,
            bits=0,
            group=0,
        )
        out.append(FFN(s.layer, s.x, z, s.y, s.w_gate, s.w_up, s.w_down_t))
    return out
