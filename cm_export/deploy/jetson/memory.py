"""The memory that building and running take on a device, predicted from sizes; no device has confirmed it yet.

    run    weights of every engine + caches + activations of every engine + CUDA and TensorRT themselves + host loop
    build  3 x the weights of the largest engine + CUDA and TensorRT themselves       (engines are built one at a time)

The token embedding and the plans are mapped, not read: of the table only the rows of one cache are counted. Caches and
decode's activations count max_batch times; prompts and pictures are read one at a time. Jetson's CPU and GPU share one
memory, so everything counts against the same limit. Factors: `FACTORS`, with sources.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from ...bundle.names import core_row_names
from ...quant import precision as precision_facts
from ...recipe.engine import EngineSettings
from .devices import PRECISIONS

FACTORS = {
    "builder": (3.0, "builders are reported to need 2 to 3 times the weights of the engine; the worse one"),
    "runtime": (600_000_000, "CUDA context and TensorRT's libraries, resident; an estimate, bytes"),
    "host": (
        250_000_000,
        "Python 3.10 with the host loop and a tokenizer of 151,000 tokens took 206 MB on x86, bytes",
    ),
}
_PAGE = 4096  # bytes of a file that are mapped at a time
_SMALLEST = 256  # rows of a cache, or patches of a picture, that are still worth proposing
Weights = dict[str, int]  # bytes by graph


@dataclass(frozen=True)
class Prediction:
    """Bytes by purpose; it fits if both building and running stay within the limit."""

    parts: dict[str, int]  # of running
    build_bytes: int
    limit_bytes: int
    largest: tuple[str, int] = ("", 0)  # what is likely to be asked of CUDA in one piece

    @property
    def run_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return max(self.build_bytes, self.run_bytes) <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and --json."""
        return {
            "build_bytes": self.build_bytes,
            "run_bytes": self.run_bytes,
            "limit_bytes": self.limit_bytes,
            "fits": self.fits,
            "largest": {"what": self.largest[0], "bytes": self.largest[1]},
            "parts": self.parts,
            "factors": {name: value for name, (value, _) in FACTORS.items()},
            "status": "predicted; never checked on a device",
        }


def predict(weights: Weights, bundle: Any, engine: EngineSettings, kv: str, fused: bool, limit: int) -> Prediction:
    """`engine`: capacity, longest prompt and largest picture. `kv`: "in_place" or "copy". `fused`: native attention."""
    parts = {f"weights of {name}": size for name, size in weights.items()}
    s = bundle.shape
    cache = s.layers * 2 * s.kv_heads * s.head_dim * 2 * engine.capacity  # bytes of one request's keys and values
    parts["cache"] = cache * engine.max_batch * (1 if kv == "in_place" else 2)
    if engine.max_batch > 1:  # rows that join and the group that they join are still there while they are put together
        parts["cache, regrouped"] = cache * (2 * engine.max_batch - 1)
    for name in weights:
        parts[f"activations of {name}"] = _ACTIVATIONS[name](bundle, engine, fused)
    # TensorRT is believed to ask for the weights of an engine at once, as for its scratch memory; a cache is one loan.
    largest = max(parts.items(), key=lambda part: part[1])
    row = -(-2 * s.hidden // _PAGE) * _PAGE
    parts["embedding table"] = min(s.vocab * s.hidden * 2, engine.capacity * row)
    parts["CUDA and TensorRT"] = int(FACTORS["runtime"][0])
    parts["host loop"] = int(FACTORS["host"][0])
    build = int(FACTORS["builder"][0] * max(weights.values(), default=0) + FACTORS["runtime"][0])
    return Prediction(parts, build, limit, largest)


def estimated_weights(bundle: Any, graphs: Iterable[str], precision: str) -> Weights:
    """Bytes of each engine's weights before they are written: matrices 16 bit, vectors 32, and what `precision` packs.

    Groups are taken to be as large as they may be.
    """
    ffn = {name for layer in core_row_names(bundle.family, bundle.shape.layers) for name in layer}
    layers = bundle.family.layer.partition("{")[0]
    kind, out = precision_facts.PRECISIONS[precision], {}
    packed_size = kind.weights.bits_per_weight / 8 if kind.weights else math.nan  # nan: this precision packs nothing
    for graph in graphs:
        total = 0.0
        for tensor in onnx.load(bundle.graph(graph), load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            size, name = float(np.prod(tensor.dims, dtype=np.float64)), tensor.name
            packed = {
                "": False,
                "ffn": graph == "decode" and name in ffn,
                "layers": name.startswith(layers),
            }[kind.packs]
            if tensor.data_type == onnx.TensorProto.INT4:  # what `predicted` chooses by
                total += size / 2
            elif len(tensor.dims) < 2 or name.startswith("predictor."):
                total += 4 * size
            else:
                total += size * (packed_size if packed else kind.products.itemsize)
        out[graph] = round(total)
    return out


def smaller(
    bundle: Any, graphs: Iterable[str], precision: str, engine: EngineSettings, kv: str, fused: bool, limit: int
) -> str:
    """Options of `pack` that would fit: single changes where one suffices, else the least combination; "" if nothing fits."""
    names = tuple(graphs)
    precisions = PRECISIONS[PRECISIONS.index(precision) :]
    weights = {p: estimated_weights(bundle, names, p) for p in precisions}
    capacities = _halves(engine.capacity)
    patches = _halves(engine.max_patches) if "vision" in names else [engine.max_patches]

    def options(p: str, c: int, n: int) -> str:
        changed = (
            ("precision", p, precision),
            ("capacity", c, engine.capacity),
            ("max-patches", n, engine.max_patches),
        )
        return " ".join(f"--{name} {new}" for name, new, old in changed if new != old)

    def first(tried: Iterable[tuple[str, int, int]]) -> list[str]:
        fitting = (t for t in tried if predict(weights[t[0]], bundle, at(engine, *t[1:]), kv, fused, limit).fits)
        return [options(*t) for t in fitting][:1]

    alone = [
        *first((p, engine.capacity, engine.max_patches) for p in precisions[1:]),
        *first((precision, c, engine.max_patches) for c in capacities[1:]),
        *first((precision, engine.capacity, n) for n in patches[1:]),
    ]
    return " or ".join(alone) or "".join(first(itertools.product(precisions, capacities, patches)))


def at(engine: EngineSettings, capacity: int, max_patches: int) -> EngineSettings:
    """The same settings with a cache of another length, which also bounds the prompt, and another largest picture."""
    return replace(engine, capacity=capacity, max_prompt=min(engine.max_prompt, capacity - 1), max_patches=max_patches)


def _halves(size: int) -> list[int]:
    """The size, and its halves that are still worth proposing."""
    return [size, *_halves(size // 2)] if size // 2 >= _SMALLEST else [size]


# ------------------------------------------------------------------------------------------------- activations
def _prefill(bundle: Any, e: EngineSettings, fused: bool) -> int:
    s, n = bundle.shape, e.max_prompt
    stream = 4 * 4 * n * s.hidden  # residual, norm, branch and sum in float32
    ffn = (2 + 2 + 2 + 4) * n * s.ffn  # gate, up and z in 16 bit, z again in float32 to be scored
    attention = 4 * n * n + (0 if fused else 2 * 2 * s.heads * n * n + 2 * 2 * s.heads * n * s.head_dim)
    cache = s.layers * 2 * s.kv_heads * s.head_dim * 2 * n  # handed to decode
    return stream + ffn + attention + cache + 4 * s.vocab + 4 * s.layers * s.ffn


def _decode(bundle: Any, e: EngineSettings, fused: bool) -> int:
    s = bundle.shape
    return e.max_batch * (16 * s.hidden + 10 * s.ffn + 4 * (s.heads + 1) * e.capacity + 4 * s.vocab) + (4 << 20)


def _vision(bundle: Any, e: EngineSettings, fused: bool) -> int:
    return bundle.tower.engine_memory(e.max_patches, fused)


_ACTIVATIONS = {"prefill": _prefill, "decode": _decode, "vision": _vision}
