"""TensorRT for RTX: the same engines on a workstation's GPU, without plugins; rows are gathered once per request."""

from ..bundle.bundle import Bundle
from ..host.backend import Graphs
from ..recipe.recipe import Recipe
from .tensorrt.backend import Backend, open_as

NAME, MODULE = "tensorrt-rtx", "tensorrt_rtx"


def open(
    bundle: Bundle,
    threads: int = 0,
    recipe: Recipe | None = None,
    graph: Graphs | None = None,
    device: str | None = None,
) -> Backend:
    """The engines of an open bundle; errors as of tensorrt.open."""
    return open_as(NAME, MODULE, bundle, threads, recipe, graph, device)
