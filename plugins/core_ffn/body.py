"""The meaning of CoreFFN as an ONNX function: list the neurons, read their rows, multiply.

    core_neurons [..,K] -> neurons [..,K*block] -> rows of the three weights (words -> numbers if bits) -> z -> y

The rows are gathered before they are unpacked: what nobody lists is never read. An id below 0 lists nothing. In the form
"active" there are no lists: channels of x, and then of z, below a threshold count as zero (plugins/threshold.py).
"""

import onnx

from cm_export.base.by_name import nearest
from cm_export.base.errors import InputError, SurgeryError
from cm_export.base.onnx_text import function as parse

from ..contract import declared
from ..threshold import above

# ONNX text that reads gate_out and writes activated, named as in transformers.activations.ACT2FN. ONNX Runtime and
# TensorRT know these ops as they stand; CastLike keeps the text free of the element type.
_SILU = "gate_sigmoid = Sigmoid (gate_out)  activated = Mul (gate_out, gate_sigmoid)"
_GELU_TANH = 'activated = Gelu <approximate = "tanh"> (gate_out)'
ACTIVATIONS: dict[str, str] = {
    "silu": _SILU,
    "swish": _SILU,
    "gelu": "activated = Gelu (gate_out)",
    "gelu_pytorch_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "quick_gelu": """
        slope_f32 = Constant <value_float = 1.702> ()
        slope = CastLike (slope_f32, gate_out)
        gate_steep = Mul (gate_out, slope)
        gate_sigmoid = Sigmoid (gate_steep)
        activated = Mul (gate_out, gate_sigmoid)""",
    "relu": "activated = Relu (gate_out)",
    "relu2": "gate_relu = Relu (gate_out)  activated = Mul (gate_relu, gate_relu)",
    "leaky_relu": "activated = LeakyRelu <alpha = 0.01> (gate_out)",
    "sigmoid": "activated = Sigmoid (gate_out)",
    "tanh": "activated = Tanh (gate_out)",
    "mish": "gate_plus = Softplus (gate_out)  gate_tanh = Tanh (gate_plus)  activated = Mul (gate_out, gate_tanh)",
}

WEIGHTS = ("w_gate", "w_up", "w_down_t")
SCALES = ("gate_scale", "up_scale", "down_scale")
BITS = (0, 4, 8)

_PRODUCT = "z = Mul (activated, up_out)"


def _listed(padding: str) -> str:
    """z, zero where an id lists nothing; `padding`: what makes is_padding_z [B,1,N] or [B,S,N]."""
    return f"""
        z_all = Mul (activated, up_out)
        {padding}
        nothing_f32 = Constant <value_float = 0.0> ()
        nothing = CastLike (nothing_f32, z_all)
        z = Where (is_padding_z, nothing, z_all)"""


FORMS = {  # index form: (how gate_out and up_out are made from the rows, how z and y are made from activated and up_out)
    "none": (
        """
        gate_DF = Transpose <perm = [1, 0]> (gate_rows)
        up_DF = Transpose <perm = [1, 0]> (up_rows)
        gate_out = MatMul (x, gate_DF)
        up_out = MatMul (x, up_DF)""",
        f"{_PRODUCT}  y = MatMul (z, down_rows)",
    ),
    "request": (
        """
        gate_BDN = Transpose <perm = [0, 2, 1]> (gate_rows)
        up_BDN = Transpose <perm = [0, 2, 1]> (up_rows)
        gate_out = MatMul (x, gate_BDN)
        up_out = MatMul (x, up_BDN)""",
        f"""{_listed("second = Constant <value_ints = [1]> ()  is_padding_z = Unsqueeze (is_padding, second)")}
        y = MatMul (z, down_rows)""",
    ),
    "token": (
        """
        x_BSD1 = Unsqueeze (x, last)
        gate_BSN1 = MatMul (gate_rows, x_BSD1)
        up_BSN1 = MatMul (up_rows, x_BSD1)
        gate_out = Squeeze (gate_BSN1, last)
        up_out = Squeeze (up_BSN1, last)""",
        f"""{_listed("is_padding_z = Identity (is_padding)")}
        token_axis = Constant <value_ints = [2]> ()
        z_BS1N = Unsqueeze (z, token_axis)
        y_BS1D = MatMul (z_BS1N, down_rows)
        y = Squeeze (y_BS1D, token_axis)""",
    ),
    "active": (
        f"""
        {above("x", "x_norm", "x_threshold", "x_kept")}
        gate_DF = Transpose <perm = [1, 0]> (gate_rows)
        up_DF = Transpose <perm = [1, 0]> (up_rows)
        gate_out = MatMul (x_kept, gate_DF)
        up_out = MatMul (x_kept, up_DF)""",
        f"""
        z_all = Mul (activated, up_out)
        {above("z_all", "z_norm", "z_threshold", "z")}
        y = MatMul (z, down_rows)""",
    ),
}

# core_neurons lists blocks of neighbours: id i stands for the neurons i*block .. i*block+block-1. All those of an id below
# 0 are below 0 themselves: they are padding, and read row 0 in vain.
_NEURONS = """
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        block = Constant <value_int: int = @block> ()
        blocks = Cast <to = 7> (core_neurons)
        firsts = Mul (blocks, block)
        firsts_1 = Unsqueeze (firsts, last)
        within = Range (zero, block, one)
        neighbours = Add (firsts_1, within)
        neurons_shape = Constant <value_ints = {shape}> ()
        neurons_or_padding = Reshape (neighbours, neurons_shape)
        is_padding = Less (neurons_or_padding, zero)
        neurons = Max (neurons_or_padding, zero)"""

# How many dimensions stand before D in the rows of each form: [F,D], [B,N,D], [B,S,N,D].
_LEADING = {"none": 1, "active": 1, "request": 2, "token": 3}
LISTED = ("request", "token")
LIMITS = ("x_norm", "z_norm", "x_threshold", "z_threshold")


def inputs(index: str, bits: int) -> list[str]:
    """The inputs of a form, in the order in which every node has them."""
    chosen = {"none": (), "active": LIMITS}.get(index, ("core_neurons",))
    return ["x", *WEIGHTS, *(SCALES if bits else ()), *chosen]


def function(index: str, activation: str, bits: int = 0) -> onnx.FunctionProto:
    """The body of CoreFFN for a graph, whose nodes all share it: (x, weights x 3[, scales x 3][, core_neurons]) => (y, z).

    `index`: "none" (all neurons), "request" (core_neurons [B,K]), "token" (core_neurons [B,S,K]) or "active" (norms [D] and
    [F] and thresholds [B,1] of both sides).
    `bits`: 0 (weights in x's type) or 8 or 4 (int32 words). The block and the group are read from the node.
    Float32 or float16. Raises InputError for an unknown activation, SurgeryError for an unknown form.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"unknown activation {activation!r}", where="CoreFFN", fix=nearest(activation, [*ACTIVATIONS]))
    if index not in FORMS:
        raise SurgeryError(f"unknown index form {index!r}", where="CoreFFN", fix=nearest(index, [*FORMS]))
    if bits not in BITS:
        raise SurgeryError(f"weights of {bits} bits", where="CoreFFN", fix=f"known: {', '.join(map(str, BITS))}")
    project, combine = FORMS[index]
    listed = index in LISTED
    rows = [rows_of(weight.split("_")[1], weight, listed, bits) for weight in WEIGHTS]
    return parse(
        f"""CoreFFN {declared("activation", "block", "bits", "group")} ({", ".join(inputs(index, bits))}) => (y, z) {{
        last = Constant <value_ints = [-1]> ()
        {_NEURONS.format(shape=[0] * (_LEADING[index] - 1) + [-1]) if listed else ""}
        {unpacking(bits, _LEADING[index]) if bits else ""}
        {" ".join(rows)}
        {project}
        {ACTIVATIONS[activation]}
        {combine}
        }}"""
    )


def rows_of(part: str, weight: str, listed: bool, bits: int) -> str:
    """ONNX text that writes {part}_rows, the numbers of the listed rows (or of all) of one weight.

    With `bits`, its scales are {part}_scale, and `unpacking` comes before.
    """
    if not bits:
        how = f"Gather <axis = 0> ({weight}, neurons)" if listed else f"Identity ({weight})"
        return f"{part}_rows = {how}\n"
    words, scale = (
        (f"Gather <axis = 0> ({t}, neurons)" if listed else f"Identity ({t})") for t in (weight, f"{part}_scale")
    )
    return f"""
        {part}_words = {words}
        {part}_scale_rows = {scale}
        {part}_unsigned = Cast <to = 12> ({part}_words)
        {part}_column = Unsqueeze ({part}_unsigned, last)
        {part}_moved = BitShift <direction = "RIGHT"> ({part}_column, shifts)
        {part}_low = BitwiseAnd ({part}_moved, low_bits)
        {part}_flipped = BitwiseXor ({part}_low, sign_bit)
        {part}_wide = Cast <to = 6> ({part}_flipped)
        {part}_whole = Sub ({part}_wide, sign_value)
        {part}_grouped = Reshape ({part}_whole, groups_shape)
        {part}_float = CastLike ({part}_grouped, x)
        {part}_scale_column = Unsqueeze ({part}_scale_rows, last)
        {part}_scaled = Mul ({part}_float, {part}_scale_column)
        {part}_rows = Reshape ({part}_scaled, rows_shape)
        """


def unpacking(bits: int, leading: int) -> str:
    """Constants of the unpacking; reads `last` and the attribute `group`.

    (u xor s) - s with s = 2^(bits-1) reads the low bits as two's complement.
    """
    sign = 1 << (bits - 1)
    return f"""
        shifts_i = Constant <value_ints = {[*range(0, 32, bits)]}> ()
        shifts = Cast <to = 12> (shifts_i)
        low_bits_i = Constant <value_int = {2 * sign - 1}> ()
        low_bits = Cast <to = 12> (low_bits_i)
        sign_i = Constant <value_int = {sign}> ()
        sign_bit = Cast <to = 12> (sign_i)
        sign_value = Cast <to = 6> (sign_i)
        leading = Constant <value_ints = {[0] * leading}> ()
        group = Constant <value_int: int = @group> ()
        group_1 = Reshape (group, last)
        groups_shape = Concat <axis = 0> (leading, last, group_1)
        rows_shape = Concat <axis = 0> (leading, last)"""
