"""Ops that some TensorRT versions do not know, written out in ones that all of them know; and the two forms of the cache.

Norm       x * rsqrt(mean(x^2) + epsilon) * w          RMSNormalization, in float32
Attend     softmax(scale q k^T + mask) v               Attention; k and v repeated for their query heads
AttendToAll  the same without a mask                   Attention among all rows of a tile
Rotate     halves of a head turned by cos and sin      RotaryEmbedding; x [B,H,S,d], cos and sin [B,S,d/2]
CacheRow   present = past, with new rows               a copy (older), or in place (TensorScatter, the KV update)
Seen       which rows each of several tokens sees      those that count, up to its own
CoreRows   CoreFFN over rows that were gathered        where there is no plugin
"""

import onnx

from ...base.onnx_text import DOMAIN, function
from ...plugins.core_ffn.op import ACTIVATIONS

NORM = function("""
    Norm <epsilon> (x, weight) => (y) {
        axis = Constant <value_ints = [-1]> ()
        epsilon = Constant <value_float: float = @epsilon> ()
        squares = Mul (x, x)
        mean = ReduceMean <keepdims = 1> (squares, axis)
        safe = Add (mean, epsilon)
        length = Sqrt (safe)
        direction = Div (x, length)
        y = Mul (direction, weight)
    }""")


def _attention(name: str, mask: str, masked: str) -> onnx.FunctionProto:
    """q [B,H,S,d], k and v [B,Hk,P,d] -> [B,H,S,d]; `masked` makes scores of products."""
    return function(f"""
        {name} <scale> (q, k, v{mask}) => (y) {{
            two = Constant <value_ints = [2]> ()
            batch = Shape <start = 0, end = 1> (q)
            heads = Shape <start = 1, end = 2> (q)
            size = Shape <start = 3> (q)
            key_heads = Shape <start = 1, end = 2> (k)
            context = Shape <start = 2, end = 3> (k)
            group = Div (heads, key_heads)
            grouped = Concat <axis = 0> (batch, key_heads, group, context, size)
            flat = Concat <axis = 0> (batch, heads, context, size)
            k_1 = Unsqueeze (k, two)
            v_1 = Unsqueeze (v, two)
            k_repeated = Expand (k_1, grouped)
            v_repeated = Expand (v_1, grouped)
            k_heads = Reshape (k_repeated, flat)
            v_heads = Reshape (v_repeated, flat)
            factor32 = Constant <value_float: float = @scale> ()
            factor = CastLike (factor32, q)
            q_scaled = Mul (q, factor)
            k_t = Transpose <perm = [0, 1, 3, 2]> (k_heads)
            logits = MatMul (q_scaled, k_t)
            {masked}
            weights = Softmax <axis = -1> (scores)
            y = MatMul (weights, v_heads)
        }}""")


ATTENTION = _attention("Attend", ", mask", "scores = Add (logits, mask)")
ATTENTION_TO_ALL = _attention("AttendToAll", "", "scores = Identity (logits)")

ROTATE = function("""
    Rotate (x, cos, sin) => (y) {
        one = Constant <value_ints = [1]> ()
        cos_B1SD = Unsqueeze (cos, one)
        sin_B1SD = Unsqueeze (sin, one)
        first, second = Split <axis = -1, num_outputs = 2> (x)
        first_cos = Mul (first, cos_B1SD)
        second_sin = Mul (second, sin_B1SD)
        second_cos = Mul (second, cos_B1SD)
        first_sin = Mul (first, sin_B1SD)
        left = Sub (first_cos, second_sin)
        right = Add (second_cos, first_sin)
        y = Concat <axis = -1> (left, right)
    }""")

CACHE_COPY = function("""
    CacheRow (past, new, at) => (present) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        column = Constant <value_ints = [1]> ()
        around = Constant <value_ints = [1, 2, 3]> ()
        rows = Shape <start = 2, end = 3> (past)
        capacity = Squeeze (rows)
        row = Range (zero, capacity, one)
        row_C1 = Unsqueeze (row, column)
        at_B111 = Unsqueeze (at, around)
        is_here = Equal (row_C1, at_B111)
        present = Where (is_here, new, past)
    }""")

CACHE_COPY_SEVERAL = function("""
    CacheRow (past, new, at) => (present) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        ends = Constant <value_ints = [1, 3]> ()
        last = Constant <value_ints = [-1]> ()
        rows = Shape <start = 2, end = 3> (past)
        capacity = Squeeze (rows)
        row = Range (zero, capacity, one)
        at_B1 = Unsqueeze (at, last)
        offset_BC = Sub (row, at_B1)
        count = Shape <start = 2, end = 3> (new)
        is_new_1 = Less (offset_BC, count)
        is_new_0 = GreaterOrEqual (offset_BC, zero)
        is_new = And (is_new_0, is_new_1)
        is_new_B1C1 = Unsqueeze (is_new, ends)
        most = Sub (count, one)
        bounded = Min (offset_BC, most)
        place_BC = Max (bounded, zero)
        place_B1C1 = Unsqueeze (place_BC, ends)
        one_1 = Constant <value_ints = [1]> ()
        heads = Shape <start = 1, end = 2> (past)
        per_head = Concat <axis = 0> (one_1, heads, one_1, one_1)
        place_BHC1 = Expand (place_B1C1, per_head)
        moved = GatherND <batch_dims = 2> (new, place_BHC1)
        present = Where (is_new_B1C1, moved, past)
    }""")

SEEN = function("""
    Seen (counts, at, rows, embeds) => (seen) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        first = Constant <value_ints = [1]> ()
        last = Constant <value_ints = [-1]> ()
        new_1 = Shape <start = 1, end = 2> (embeds)
        new = Squeeze (new_1)
        offset = Range (zero, new, one)
        at_B1 = Unsqueeze (at, last)
        own_BN = Add (at_B1, offset)
        own_BN1 = Unsqueeze (own_BN, last)
        is_later = Greater (rows, own_BN1)
        is_before = Not (is_later)
        counts_B1C = Unsqueeze (counts, first)
        seen = And (counts_B1C, is_before)
    }""")

CACHE_IN_PLACE = onnx.parser.parse_function(
    f'<domain: "{DOMAIN}", opset_import: ["" : 24]> CacheRow (past, new, at) => (present) '
    '{ present = TensorScatter <axis = -2, mode = "linear"> (past, new, at) }'
)


def core_rows(activation: str) -> onnx.FunctionProto:
    """CoreFFN over gathered rows: x [B,N,D], gate, up and down [B,K,D] -> y [B,N,D], z [B,N,K]."""
    return function(f"""CoreRows (x, gate, up, down) => (y, z) {{
        gate_t = Transpose <perm = [0, 2, 1]> (gate)
        up_t = Transpose <perm = [0, 2, 1]> (up)
        gate_out = MatMul (x, gate_t)
        up_out = MatMul (x, up_t)
        {ACTIVATIONS[activation]}
        z = Mul (activated, up_out)
        y = MatMul (z, down)
    }}""")
