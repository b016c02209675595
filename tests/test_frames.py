"""Room for frames: a loop at any depth asks the system for no memory."""

import resource
import sys

import pytest

from cm_export.base.frames import with_room


def leaf(a, b=1):
    return a + b


def calls(depth):
    """Page faults of 3000 calls that are made at this depth."""
    if depth:
        return calls(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(3000):
        leaf(i)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_is_called_returns_and_raises_as_it_would():
    assert with_room(leaf, 1, b=3) == 4
    with pytest.raises(TypeError):
        with_room(leaf)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames lie elsewhere")
def test_no_depth_takes_memory_in_every_call():
    assert max(with_room(lambda: [calls(depth) for depth in range(300)])) < 1000
