"""Bundles of one checkpoint that are compared with each other, such as those of several precisions.

open_beside(first, [int8.plan, int4.plan])  ->  [Bundle, Bundle]
"""

from collections.abc import Sequence
from pathlib import Path

from ..base.errors import InputError
from .bundle import Bundle
from .calibration import checkpoint_id


def open_beside(first: Bundle, paths: Sequence[Path]) -> list[Bundle]:
    """The further bundles. Raises InputError for one of another checkpoint and for one that is given twice, BundleError."""
    out: list[Bundle] = []
    for path in paths:
        bundle = Bundle(path)
        if checkpoint_id(bundle.manifest["model"]["files"]) != checkpoint_id(first.manifest["model"]["files"]):
            what = f"is of another checkpoint than {first.path}"
            raise InputError(what, where=path, fix="build both with the same --model")
        if bundle.seal in [b.seal for b in (first, *out)]:
            raise InputError("is given twice", where=path, fix="give each bundle once")
        out.append(bundle)
    return out
