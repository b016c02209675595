"""Which Gemm is nothing but a product with a weight and a bias: y = x w^T + b."""

import onnx


def is_plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is x w^T + b, nothing scaled and x not turned."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    plain = values.get("alpha", 1.0) == 1 and values.get("beta", 1.0) == 1
    return bool(plain and values.get("transB", 0) == 1 and values.get("transA", 0) == 0)
