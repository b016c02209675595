"""The table [engine] of a recipe: what TensorRT engines are built for, and the largest request that they take."""

from dataclasses import dataclass

from ..base.errors import InputError
from ..quant.precision import PRECISIONS
from .option import check_fields, option


@dataclass(frozen=True)
class EngineSettings:
    """The settings of [engine]; an engine is a TensorRT plan, and a bundle that runs on ONNX Runtime has none."""

    # fp32, fp16, bf16: of products, FFN, attention and cache; what is small is float32 in all of them.
    precision: str = option(
        "fp16",
        "--precision",
        "Type of weights, products and cache; int8: FFN weights of decode only; int4: all decoder weights but the logits'",
        choices=tuple(PRECISIONS),
    )
    capacity: int = option(4096, "--capacity", "Rows of the cache: prompt and answer together", low=96, high=2**20)
    # Proofs of engines use, of Qwen2-VL, a prompt of 34 tokens and a picture of 12 x (patches merged per side)^2 patches, 48
    # or 108; of LLaVA two pictures of 576 tokens. A build says where either is too small.
    max_prompt: int = option(2048, "--max-prompt", "Longest prompt, in tokens", low=48, high=2**19)
    max_patches: int = option(4096, "--max-patches", "Patches of the largest picture", low=128, high=2**20)
    max_batch: int = option(1, "--max-batch", "Requests that decode together", low=1, high=4096)
    optimization_level: int = option(
        3,
        "--optimization-level",
        "How long the builder searches for fast kernels: 0 shortest, 5 longest",
        low=0,
        high=5,
    )
    workspace_mb: int = option(
        0, "--workspace-mb", "Scratch memory that the builder may use, in MB; 0: no limit", low=0, high=2**20
    )
    weight_streaming: bool = option(
        False, "--weight-streaming/--no-weight-streaming", "Let weights stay in host memory while an engine runs"
    )
    strip_weights: bool = option(
        False, "--strip-weights/--no-strip-weights", "Plans without weights, for runtimes that refit them; `run` cannot"
    )
    plugins: str = option("", "--plugins", "File libcm_plugins.so.  [default: where `make plugins` puts it]", path=True)
    architecture: str = option(
        "", "--architecture", "Cards that are not in this machine, such as sm_86,sm_89; for tensorrt-rtx"
    )
    turns: bool = option(
        True,
        "--turn-engine/--no-turn-engine",
        "An engine for later questions as well, where the bundle can answer them; it has weights of its own",
    )
    dense: bool = option(
        True,
        "--dense-engines/--no-dense-engines",
        "Engines of the dense graphs as well, for `run --dense`, eval and bench",
    )


def check_engine(e: EngineSettings, where: str) -> None:
    """Raises InputError naming the first field that cannot hold."""
    check_fields(e, "engine.", where)
    if e.capacity <= e.max_prompt:
        fix = f"give more than max_prompt, {e.max_prompt}: a prompt and its answer share the cache"
        raise InputError(f"engine.capacity = {e.capacity}", where=where, fix=fix)
