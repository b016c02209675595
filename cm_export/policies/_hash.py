"""A repeatable pseudo-random order in exact int64 arithmetic, the same in torch and in ONNX.

    r(x, a) = ((x + a) mod p)^3 mod p          p prime, p mod 3 = 2: cubing is then a permutation of 0..p-1
    u = r(first mod p, A)   v = r(u + second, B)   hash(x) = r(r(r(x, u), v), C)

For fixed `first` and `second` the hash is one permutation of 0..p-1, so different x never tie. p is near 2^20: its cube
fits int64, every value is exact in float32, and no model has that many neurons or prompt tokens.
"""

from __future__ import annotations

from ._torch import torch

P = 1048571
A, B, C = 271829, 662607, 141421


def _round(x: torch.Tensor, key: torch.Tensor | int) -> torch.Tensor:
    return ((x + key) % P) ** 3 % P


def scramble(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor | int) -> torch.Tensor:
    """hash(x) in 0..p-1, int64; x in 0..p-1, `first` any int64, `second` in 0..2^40; the three broadcast."""
    u = _round(first % P, A)
    v = _round(u + second, B)
    return _round(_round(_round(x, u), v), C)


def _round_text(out: str, x: str, key: str) -> str:
    return f"""
        {out}_sum = Add ({x}, {key})
        {out}_mod = Mod ({out}_sum, hash_p)
        {out}_square = Mul ({out}_mod, {out}_mod)
        {out}_cube = Mul ({out}_square, {out}_mod)
        {out} = Mod ({out}_cube, hash_p)"""


def scramble_text(out: str, x: str, first: str, second: str) -> str:
    """The nodes that compute `out` = scramble(x, first, second); int64 names of the enclosing function."""
    return f"""
        hash_p = Constant <value_int = {P}> ()
        hash_a = Constant <value_int = {A}> ()
        hash_b = Constant <value_int = {B}> ()
        hash_c = Constant <value_int = {C}> ()
        hash_first = Mod ({first}, hash_p)
        {_round_text("hash_u", "hash_first", "hash_a")}
        hash_u_second = Add (hash_u, {second})
        {_round_text("hash_v", "hash_u_second", "hash_b")}
        {_round_text("hash_1", x, "hash_u")}
        {_round_text("hash_2", "hash_1", "hash_v")}
        {_round_text(out, "hash_2", "hash_c")}"""
