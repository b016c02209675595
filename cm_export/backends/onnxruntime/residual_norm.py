"""The sums of a step's residual stream and their norms, each pair as one op of the native library.

    sum = Add(x, added)   y = RMSNormalization(sum, weight)   ->   y, sum = ResidualNorm(x, added, weight)

x is the embeddings or such a sum, `added` what a packed product gives, so that both have one shape. ONNX Runtime's own norm
wakes its threads as soon as two tokens are read together, which takes longer than the norm.
"""

import onnx

from .lower import attribute
from .pack import NATIVE

OP = "ResidualNorm"
_WIDTH = {"PackedMatMul": "N", "PackedFFN": "D"}  # the attribute that is the last dimension of what a product gives
_EPSILON = 1e-5  # of RMSNormalization, where a node says nothing


def normalise_sums(model: onnx.ModelProto) -> None:
    """Rewrite in place; sums of anything else and other norms stay."""
    graph = model.graph
    lengths = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) == 1}
    copied: dict[str, str] = {}  # name of a copy -> of what
    widths: dict[str, int] = {}  # of what products give
    stream = {"inputs_embeds"}
    sums: dict[str, tuple[onnx.NodeProto, str, str]] = {}  # those without a norm: Add, x, what is added
    taken: set[str] = set()
    for node in graph.node:
        read = [copied.get(name, name) for name in node.input]
        if node.op_type == "Identity":
            copied[node.output[0]] = read[0]
        elif node.domain == NATIVE and node.op_type in _WIDTH:
            widths[node.output[0]] = attribute(node, _WIDTH[node.op_type])
        elif node.op_type == "Add":
            for x, added in (read, read[::-1]):
                if x in stream and added in widths:
                    stream.add(node.output[0])
                    sums[node.output[0]] = node, x, added
        elif node.op_type == "RMSNormalization" and read[0] in sums and attribute(node, "axis") in (None, -1):
            add, x, added = sums[read[0]]
            if lengths.get(node.input[1]) != widths[added]:
                continue
            epsilon = attribute(node, "epsilon")
            made = onnx.helper.make_node(
                OP,
                [x, added, node.input[1]],
                [node.output[0], add.output[0]],
                domain=NATIVE,
                epsilon=_EPSILON if epsilon is None else epsilon,
            )
            del sums[read[0]]  # a second norm of the same sum stays as it is
            taken.add(node.output[0])
            add.CopyFrom(made)
    left = [node for node in graph.node if node.op_type != "RMSNormalization" or node.output[0] not in taken]
    del graph.node[:]
    graph.node.extend(left)
