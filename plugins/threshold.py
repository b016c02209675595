"""Which channels of a vector are worth reading a row of weights for: the ONNX text that every op with thresholds shares.

    kept_i = x_i  unless  |x_i| norm_i < threshold      norm_i: of the weights that channel i multiplies

Norms and thresholds are float32 whatever x is: rounded to 16 bit they would keep other channels than they were measured for.
A NaN is below nothing, so it stays and is seen in the result; a threshold of 0 keeps everything.
Sources: TEAL (arXiv 2408.14690), WINA (arXiv 2505.19427) and CATS (arXiv 2404.08763), each for one side of a product.
"""

import numpy as np


def above(values: str, norm: str, threshold: str, out: str) -> str:
    """ONNX text that writes `out` from values [B,S,N], norm [N] and threshold [B,1]; names begin with that of the values."""
    return f"""
        {values}_axis = Constant <value_ints = [-1]> ()
        {values}_size_x = Abs ({values})
        {values}_size = Cast <to = 1> ({values}_size_x)
        {values}_weight = Mul ({values}_size, {norm})
        {values}_limit = Unsqueeze ({threshold}, {values}_axis)
        {values}_is_low = Less ({values}_weight, {values}_limit)
        {values}_zero_f32 = Constant <value_float = 0.0> ()
        {values}_zero = CastLike ({values}_zero_f32, {values})
        {out} = Where ({values}_is_low, {values}_zero, {values})"""


def between(weights: np.ndarray, kept: float) -> np.ndarray:
    """[B,1]: thresholds that about a share `kept` of each request's weights [B,S,N] is above, in the widest gap nearby.

    Float16 computes z to a thousandth, so a threshold close to a value would keep it in one place and not in another.
    """
    out = np.zeros((len(weights), 1))
    for b, of_request in enumerate(weights):
        ordered = np.sort(of_request.ravel())
        at = round((1 - kept) * len(ordered))
        near = range(max(1, at - 6), min(len(ordered), at + 7))
        if 0 < at < len(ordered):
            best = max(near, key=lambda i: ordered[i] / max(ordered[i - 1], 1e-9) if ordered[i - 1] else 0.0)
            out[b] = (ordered[best - 1] + ordered[best]) / 2
    return out
