"""Which channels of a vector are worth reading a row of weights for: the ONNX text that every op with thresholds shares.

    kept_i = x_i  unless  |x_i| norm_i < threshold      norm_i: of the weights that channel i multiplies

A NaN is below nothing, so it stays and is seen in the result; a threshold of 0 keeps everything.
Sources: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427) and CATS (arXiv 2404.08763), each for one side of a product.
"""


def above(values: str, norm: str, threshold: str, out: str) -> str:
    """ONNX text that writes `out` from values [B,S,N], norm [N] and threshold [B,1]; names begin with that of the values."""
    return f"""
        {values}_axis = Constant <value_ints = [-1]> ()
        {values}_size = Abs ({values})
        {values}_weight = Mul ({values}_size, {norm})
        {values}_limit = Unsqueeze ({threshold}, {values}_axis)
        {values}_is_low = Less ({values}_weight, {values}_limit)
        {values}_zero_f32 = Constant <value_float = 0.0> ()
        {values}_zero = CastLike ({values}_zero_f32, {values})
        {out} = Where ({values}_is_low, {values}_zero, {values})"""
