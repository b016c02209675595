"""Every product of decode reads only channels that weigh more than a threshold; the thresholds are an input.

before: x -> CoreFFN(x, Wg, Wu, Wd_t)         after: x, core_thresholds[:, 4l], [:, 4l+1] -> CoreFFN "active"
        x -> MatMul(Wq), MatMul(Wk), ...             x, core_thresholds[:, 4l+2]          -> CoreLinear(Wq), ...
        h -> MatMul(head)                            h, core_thresholds[:, 4L]            -> CoreLinear(head)

core_thresholds [B,4L+1]: of each request; order of columns and what is stored: bundle/thresholds.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from ..base import dims
from ..bundle.predictor import row_norms
from ..bundle.thresholds import ATTENTION_IN, ATTENTION_OUT, FFN_IN, FFN_OUT, SIDES
from ..bundle.weights import WeightFile
from ..families import Family
from ..plugins.core_linear.op import AS_STORED, OP
from .edit import Edit
from .find_sites import FFN
from .products import Product, head_product, layer_products
from .replace_ffn import replace_ffn

Norms = Callable[[Sequence[str]], np.ndarray]


def norms_of(file: WeightFile) -> Norms:
    """What says, for weights [N,D] that read the same x by their stored names, [D] float32: the norm of what x_d multiplies."""

    def norm(names: Sequence[str]) -> np.ndarray:
        total = sum(_squares(file[name]) for name in names)
        return np.sqrt(total, dtype=np.float64).astype(np.float32)

    return norm


def _squares(weight: np.ndarray, block: int = 2048) -> np.ndarray:
    """Sums of squares down the columns, a block of rows at a time: a head in float64 would fill the memory."""
    return np.sum([np.square(weight[i : i + block].astype(np.float64)).sum(0) for i in range(0, len(weight), block)], 0)


def keep_active(edit: Edit, family: Family, layers: int, activation: str, file: WeightFile) -> list[FFN]:
    """Rewrite all layers and the head; returns the FFNs. Raises SurgeryError where a product is not found."""
    given = edit.add_input("core_thresholds", np.float32, [dims.BATCH, SIDES * layers + 1])
    split = [gs.Variable(f"threshold.{i}", dtype=np.float32) for i in range(SIDES * layers + 1)]
    edit.graph.nodes.append(
        gs.Node("Split", "thresholds", attrs={"axis": 1, "num_outputs": len(split)}, inputs=[given], outputs=split)
    )
    norm = norms_of(file)

    def limits(site: FFN) -> list[gs.Tensor]:
        x_norm = edit.constant(norm([site.w_gate.name, site.w_up.name]), np.float32)
        z_norm = edit.constant(row_norms(file[site.w_down_t.name]), np.float32)
        return [x_norm, z_norm, split[SIDES * site.layer + FFN_IN], split[SIDES * site.layer + FFN_OUT]]

    def linear(products: Sequence[Product], layer: int, threshold: gs.Tensor) -> None:
        own = edit.constant(norm([p.weight.name for p in products]), np.float32)
        for product in products:
            x, y = product.x, product.node.outputs[0]
            product.node.outputs.clear()
            given = [x, product.weight, own, threshold]
            edit.core_node(OP, {}, f"linear.{product.weight.name}", layer, given, [y], **AS_STORED)

    attentions, head = layer_products(edit, family, layers), head_product(edit)
    ffns = replace_ffn(edit, family, layers, activation, indexed=False, active=limits)
    for found in attentions:
        linear(found.into, found.layer, split[SIDES * found.layer + ATTENTION_IN])
        linear([found.out], found.layer, split[SIDES * found.layer + ATTENTION_OUT])
    linear([head], layers, split[-1])
    return ffns
