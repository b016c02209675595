"""The table [engine] of a recipe: what TensorRT engines are built for, and the largest request that they take."""

from dataclasses import dataclass

from ..base.by_name import nearest
from ..base.errors import InputError
from ..quant.precision import PRECISIONS


@dataclass(frozen=True)
class Engine:
    """What TensorRT engines are built for: the type of what is large, and the largest request they take."""

    # Of products, FFN, attention and cache; the rest is float32. int8: FFN rows of decode; int4: those, and all weights
    # of the decoder besides the logits', the cache in fp16.
    precision: str = "fp16"
    capacity: int = 4096  # rows of the cache: prompt and answer together
    max_prompt: int = 2048  # tokens that a prefill reads
    max_patches: int = 4096  # of one picture
    max_batch: int = 1
    optimization_level: int = 3  # of the builder, 0 to 5
    workspace_mb: int = 0  # of the builder; 0: as much as it wants
    weight_streaming: bool = False  # weights may stay in host memory
    strip_weights: bool = False  # plans without weights, refitted when loaded
    plugins: str = ""  # path of libcm_plugins.so; "": where `make plugins` puts it
    architecture: str = ""  # of cards that are not here, such as "sm_86,sm_89" (tensorrt-rtx); "": of the one that is
    dense: bool = True  # engines of the dense graphs as well: --dense, and the controls of eval and bench


def check_engine(e: Engine, where: str) -> None:
    """Raises InputError naming the first field that cannot hold."""
    if e.precision not in PRECISIONS:
        fix = nearest(e.precision, list(PRECISIONS))
        raise InputError(f"engine.precision = {e.precision!r}", where=where, fix=fix)
    for label, value, low, high in (
        ("engine.max_batch", e.max_batch, 1, 4096),
        ("engine.max_prompt", e.max_prompt, 48, 2**20),  # every build proves its engines on a prompt of 34 tokens
        ("engine.capacity", e.capacity, max(64, e.max_prompt + 1), 2**20),
        ("engine.max_patches", e.max_patches, 4, 2**20),
        ("engine.optimization_level", e.optimization_level, 0, 5),
        ("engine.workspace_mb", e.workspace_mb, 0, 2**20),
    ):
        if not low <= value <= high:
            fix = f"give {low} to {high}" + (": a prompt and an answer share it" if label.endswith("capacity") else "")
            raise InputError(f"{label} = {value}", where=where, fix=fix)
