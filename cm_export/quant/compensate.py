"""Error compensation (GPTQ): an input's rounding error is taken up by the weights of inputs that come after it.

H [F,F] = X^T X of inputs X [T,F];  H = R R^T, R upper triangular;  U = R / its diagonal, column by column

    w'[k] = w[k] + sum over j < k of U[j,k] (w[j] - w^[j])       what is rounded at input k; w^[k] = what is stored of it

That is GPTQ (arXiv 2210.17323) in the form of QuIP's LDLQ (2307.13304, theorem 6: the two are equal): one Cholesky factor
and no inverse. Groups lie along the inputs, and the scales of a group are fitted when it is reached.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ..base.errors import InputError
from .rounding import Quantiser, least_squares
from .scheme import Quantised, Scheme

# Of the mean of H's diagonal, added to the diagonal. The papers have 0.01 and a hundred times as much text as a build has.
DAMP = 0.1
_TRIES = 4  # damping grows tenfold where rounding left H without a Cholesky factor


def compensated(gram: np.ndarray, fit: Callable[..., Quantised] = least_squares, damp: float = DAMP) -> Quantiser:
    """A quantiser of weights [F,D] by inputs (axis 0) for inputs with this `gram` = X^T X [F,F].

    `fit` makes the scales (and zeros) of a group: a quantiser that takes `importance`. Raises InputError for another axis, a
    gram of another shape or with values that are not finite. Time: F^2 D + F^3 / 3 multiplications.
    """
    return partial(_compensated, gram, fit, damp)


def _compensated(
    gram: np.ndarray,
    fit: Callable[..., Quantised],
    damp: float,
    weight: np.ndarray,
    scheme: Scheme,
    name: str = "weight",
) -> Quantised:
    scheme.scale_shape(weight.shape)
    _check(gram, weight, scheme, name)
    if not np.isfinite(weight).all():
        raise InputError("a weight is not finite", where=name, fix="check the checkpoint")
    feedback = _feedback(gram, damp, name)
    importance = np.diagonal(gram).astype(np.float32)
    errors = np.zeros(weight.shape, np.float32)
    found = []
    for start in range(0, len(weight), scheme.group):
        rows = slice(start, start + scheme.group)
        own, within = weight[rows].astype(np.float32), feedback[rows, rows]
        left_over = feedback[:start, rows].T @ errors[:start]
        # What the rows of the group will be asked for if none of them is rounded.
        group = fit(own + np.linalg.solve(within.T, left_over), scheme, name, importance=importance[rows])
        errors[rows], codes = _rounded(own, left_over, group, within)
        found.append(Quantised(codes, group.scale, scheme, group.zero))
    zero = None if scheme.symmetric else np.concatenate([g.zero for g in found])
    return Quantised(np.concatenate([g.codes for g in found]), np.concatenate([g.scale for g in found]), scheme, zero)


def _rounded(
    weight: np.ndarray, left_over: np.ndarray, group: Quantised, feedback: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round one group input by input -> (weight - what is stored, codes). `left_over`: what earlier groups ask of it."""
    lowest, step = group.scheme.lowest, group.scale[0].astype(np.float32)
    zero = np.float32(0) if group.zero is None else group.zero[0].astype(np.float32)
    errors, codes = np.empty(weight.shape, np.float32), np.empty(weight.shape, np.int8)
    for k in range(len(weight)):
        wanted = weight[k] + left_over[k] + feedback[:k, k] @ errors[:k]
        code = np.clip(np.rint(wanted / step) + zero, lowest, -lowest - 1)
        codes[k], errors[k] = code, weight[k] - (code - zero) * step
    return errors, codes


def _feedback(gram: np.ndarray, damp: float, name: str) -> np.ndarray:
    """U [F,F]: R of H = R R^T with each column divided by its element on the diagonal."""
    mean = max(float(np.diagonal(gram).mean()), 1e-30)
    # Cholesky gives the lower triangle; of the reversed matrix, reversed again, that is the upper one.
    turned = (gram[::-1, ::-1] / mean).astype(np.float32)
    diagonal = np.diagonal(turned).copy()
    for _ in range(_TRIES):
        np.fill_diagonal(turned, diagonal + np.float32(damp))
        try:
            root = np.linalg.cholesky(turned)[::-1, ::-1]
        except np.linalg.LinAlgError:
            damp *= 10
        else:
            return root / np.diagonal(root)
    raise InputError("H of its inputs is no matrix of squares", where=name, fix="give X^T X [F,F] of inputs X [T,F]")


def _check(gram: np.ndarray, weight: np.ndarray, scheme: Scheme, name: str) -> None:
    if scheme.axis != 0:
        raise InputError(
            f"groups along axis {scheme.axis}", where=name, fix="compensation needs groups along the inputs"
        )
    if gram.shape != (len(weight), len(weight)):
        what, fix = f"H of shape {list(gram.shape)}", f"give X^T X [{len(weight)},{len(weight)}] of its inputs"
        raise InputError(what, where=name, fix=fix)
    if not np.isfinite(gram).all():
        raise InputError("H of its inputs is not finite", where=name, fix="check the activations")
