"""What a node of an ONNX graph reads and means, without graphsurgeon."""

import onnx


def is_plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is x w^T + b, nothing scaled and x not turned."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    plain = values.get("alpha", 1.0) == 1 and values.get("beta", 1.0) == 1
    return bool(plain and values.get("transB", 0) == 1 and values.get("transA", 0) == 0)


def names_read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that the body of a loop takes from around it included."""
    bodies = [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return set(node.input).union(*(names_read(inner) for body in bodies for inner in body.node))
