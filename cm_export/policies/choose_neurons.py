"""The ONNX text of a choice made anew for every token: from predicted products to core_neurons, for graphs and lowerings.

    zp = act(gate_out) up_out      score(n) = |zp_n| norm_n      core_neurons = the `count` best, whole blocks

Its torch meaning is `choose` in neurons/predicted.py.
"""

import onnx

from ..base.onnx_text import function
from ..plugins.core_ffn.body import ACTIVATIONS


def chooser(name: str, activation: str, order: str = "ascending") -> onnx.FunctionProto:
    """`choose_text` after low-bit copies of gate and up [F,D] int4, scales [F,D/group] float32; count [1] int64."""
    return function(f"""
    {name} <group, block> (x, gate, gate_scale, up, up_scale, norm, count) => (core_neurons) {{
        gate_FD = DequantizeLinear <axis = 1, block_size: int = @group> (gate, gate_scale)
        up_FD = DequantizeLinear <axis = 1, block_size: int = @group> (up, up_scale)
        gate_DF = Transpose <perm = [1, 0]> (gate_FD)
        up_DF = Transpose <perm = [1, 0]> (up_FD)
        gate_out = MatMul (x, gate_DF)
        up_out = MatMul (x, up_DF)
        {choose_text(activation, order)}
    }}""")


def choose_text(activation: str, order: str = "ascending") -> str:
    """ONNX text: gate_out and up_out [B,N,F], x, norm, count -> core_neurons.

    `order` of the ids: "ascending", "best" first, or "any", which is enough for a mask.
    """
    if order == "ascending":
        put_in_order = "ids, order = TopK <axis = -1, largest = 0, sorted = 1> (best_ids, wanted)"
    else:
        put_in_order = "ids = Identity (best_ids)"
    return f"""
        {ACTIVATIONS[activation]}
        zp = Mul (activated, up_out)
        size = Abs (zp)
        weighed = Mul (size, norm)
        last = Constant <value_ints = [-1]> ()
        block_size = Constant <value_int: int = @block> ()
        block_1 = Reshape (block_size, last)
        lead = Shape <start = 0, end = 2> (x)
        blocks_shape = Concat <axis = 0> (lead, last, block_1)
        blocks = Reshape (weighed, blocks_shape)
        scores = ReduceSum <keepdims = 0> (blocks, last)
        wanted = Div (count, block_1)
        best, best_ids = TopK <axis = -1, largest = 1, sorted = {int(order != "any")}> (scores, wanted)
        {put_in_order}
        ids_1 = Unsqueeze (ids, last)
        firsts = Mul (ids_1, block_1)
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        within = Range (zero, block_size, one)
        members = Add (firsts, within)
        flat_shape = Concat <axis = 0> (lead, last)
        flat = Reshape (members, flat_shape)
        core_neurons = Cast <to = 6> (flat)"""
