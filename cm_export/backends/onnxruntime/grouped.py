"""Attention over a cache, all query heads that share keys in one product: the same numbers however many tokens are read.

    Attention(q, k, v, mask)  ->  GroupedAttention:  q [B,H,N,d] as [B,Hk,G N,d]     G = H / Hk query heads to one of keys
                                  scores = q k^T, softmax, scores v                  keys and values are read once, not G times
    G = 1                     ->  q as [B,H,N,1,d], one product for every token

ONNX Runtime multiplies a single row by another routine than several rows, and sums in another order: 2e-7 apart, which products
that round x to 8 bits make 1e-1 of a logit. Here a product has several rows always, or always one. So a token that
is read alone and one that is read among others (guard, later turns, drafts) have equal logits, to the last bit. Decode steps of
packed weights take one native op instead (cached_attention.py), of which the same holds.
"""

import onnx

from ...base.onnx_text import DOMAIN
from .lower import import_domain, local_function

_NAME = "GroupedAttention"


def group_attention(model: onnx.ModelProto, heads: int) -> None:
    """Rewrite in place every attention that reads a cache; `heads`: of queries."""
    past = next((v for v in model.graph.input if v.name.startswith("past.") and v.name.endswith(".key")), None)
    if past is None:
        return
    kv_heads = past.type.tensor_type.shape.dim[1].dim_value
    found = [n for nodes in (model.graph, *model.functions) for n in nodes.node if is_plain(n)]
    for node in found:
        scale = next(a for a in node.attribute if a.name == "scale")
        node.op_type, node.domain = _NAME, DOMAIN
        del node.attribute[:]
        node.attribute.append(scale)
    if found:
        for place in (model, *model.functions):
            import_domain(place)
        model.functions.append(_together(heads, kv_heads) if heads > kv_heads else _one_by_one())


def is_plain(node: onnx.NodeProto) -> bool:
    """Whether a node is an attention of q, k, v and an additive mask with no settings but its scale."""
    return (
        (node.op_type, node.domain) == ("Attention", "")
        and len(node.input) == 4
        and len(node.output) == 1
        and {a.name for a in node.attribute} == {"scale"}
    )


def _together(heads: int, kv_heads: int) -> onnx.FunctionProto:
    """0 keeps a size, -1 is what is left: G N rows of queries, or N."""
    return local_function(f"""{_NAME} <scale> (q, k, v, mask) => (y) {{
        by_keys = Constant <value_ints = [0, {kv_heads}, -1, 0]> ()
        by_queries = Constant <value_ints = [0, {heads}, -1, 0]> ()
        q_grouped = Reshape (q, by_keys)
        products = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (q_grouped, k)
        scores = Reshape (products, by_queries)
        seen = Add (scores, mask)
        shares = Softmax <axis = -1> (seen)
        shares_grouped = Reshape (shares, by_keys)
        y_grouped = MatMul (shares_grouped, v)
        y = Reshape (y_grouped, by_queries)
    }}""")


def _one_by_one() -> onnx.FunctionProto:
    return local_function(f"""{_NAME} <scale> (q, k, v, mask) => (y) {{
        of_token = Constant <value_ints = [3]> ()
        of_keys = Constant <value_ints = [2]> ()
        q_alone = Unsqueeze (q, of_token)
        k_each = Unsqueeze (k, of_keys)
        v_each = Unsqueeze (v, of_keys)
        products = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (q_alone, k_each)
        scores = Squeeze (products, of_token)
        seen = Add (scores, mask)
        shares = Softmax <axis = -1> (seen)
        shares_alone = Unsqueeze (shares, of_token)
        y_alone = MatMul (shares_alone, v_each)
        y = Squeeze (y_alone, of_token)
    }}""")
