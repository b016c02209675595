"""The proofs of `cm-export check-family`, on a checkpoint that a test has traced already."""

import pytest

from cm_export.parity.check import PROOFS
from cm_export.parity.proof import PROVED

# Lowered graphs have tests of their own, each version in one.
each_proof = pytest.mark.parametrize("proof", [p for p in PROOFS if p.name != "lowered"], ids=lambda p: p.name)


def holds(proof, x) -> None:
    result = proof.on(x)
    assert result.state == PROVED, f"{result.state} {result.value}: {result.detail}"
