"""The CPU ops beside ONNX Runtime's own and a plain read of memory, in one process and by turns: one JSON file.

    make bench-cpu
    python benchmarks/cpu_kernels.py --out artifacts/cpu-kernels.json

The FFN of Qwen2-VL-2B (D 1536, F 8960) in int4, groups of 32, as a chain of layers too large for any cache. Which neurons a
token keeps is drawn at random for each layer; x is dense noise. Times are milliseconds a layer.

    ffn SHARE      PackedFFN that reads this share of the bytes
    prompt         the same as prompts have it: every input counts, in bfloat16 if the processor has tiles of it
    matmulnbits    the same layers as MatMulNBits (accuracy_level 4: int8 products)
    read           every byte of an array once
"""

import argparse
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from _page import write_report
from onnx import TensorProto, helper

from cm_export.base import environment
from cm_export.base.onnx_text import IR_VERSION, OPSET
from cm_export.plugins.cpu import library

D, F, GROUP = 1536, 8960, 32
SHARES = {1.0: (1.0, 1.0), 0.83: (0.9, 0.7), 0.73: (0.8, 0.6), 0.63: (0.7, 0.5), 0.53: (0.6, 0.4)}  # bytes: (x, z)
ROWS = (1, 4, 16, 256)
NOISE = np.random.default_rng(0)


class Chain:
    """Layers one after another; each output is normalised, so that numbers stay as they are."""

    def __init__(self, x: str = "x"):
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, np.ndarray] = {"one": np.ones(D, np.float32)}
        self.x = x

    def add(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def store(self, values: np.ndarray) -> str:
        name = f"w{len(self.stored)}"
        self.stored[name] = values
        return name

    def end_layer(self, y: str) -> None:
        self.x = self.add("LayerNormalization", [y, "one"], axis=-1)

    def session(self, threads: int) -> ort.InferenceSession:
        # The weights stay in numpy's memory: a protobuf holds 2 GB at most, and nothing is copied.
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in INPUTS.items()]
        y = helper.make_tensor_value_info(self.x, TensorProto.FLOAT, [1, "S", D])
        stored = [elsewhere(n, a) for n, a in self.stored.items()]
        opsets = [helper.make_opsetid(d, v) for d, v in (("", OPSET), ("com.microsoft", 1), (library.DOMAIN, 1))]
        model = helper.make_model(
            helper.make_graph(self.nodes, "layers", given, [y], stored), opset_imports=opsets, ir_version=IR_VERSION
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # as the backend has it
        options.register_custom_ops_library(str(library.built()))
        names = list(self.stored)
        self.values = [ort.OrtValue.ortvalue_from_numpy(self.stored[n]) for n in names]
        options.add_external_initializers(names, self.values)
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


INPUTS: dict[str, list[int | str]] = {"x": [1, "S", D]}


def elsewhere(name: str, values: np.ndarray) -> TensorProto:
    """A tensor whose numbers are given to the session besides."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="memory")
    return tensor


def codes(*shape: int) -> np.ndarray:
    return NOISE.integers(0, 255, shape, dtype=np.uint8)


def matmulnbits(layers: int) -> Chain:
    chain = Chain()

    def product(x: str, K: int, N: int) -> str:
        weights = [
            chain.store(codes(N, K // GROUP, GROUP // 2)),
            chain.store(np.full(N * K // GROUP, 0.002, np.float32)),
        ]
        form = {"K": K, "N": N, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
        return chain.add("MatMulNBits", [x, *weights], "com.microsoft", **form)

    for _ in range(layers):
        gate, up = product(chain.x, D, F), product(chain.x, D, F)
        active = chain.add("Mul", [gate, chain.add("Sigmoid", [gate])])
        chain.end_layer(product(chain.add("Mul", [active, up]), F, D))
    return chain


def packed(layers: int, x_share: float, z_share: float, prompt: bool = False) -> Chain:
    """Kept inputs have a norm so large that any x passes the threshold, the others one of 0."""
    chain = Chain()
    none, threshold = chain.store(np.empty(0, np.uint8)), chain.store(np.full((1, 1), 1e-30, np.float32))
    form = {"bits_in": 4, "group_in": GROUP, "bits_out": 4, "group_out": GROUP, "activation": "silu"}
    form["x_bytes"] = 0 if prompt else 1

    def norm(size: int, share: float) -> str:
        if prompt:
            return chain.store(np.empty(0, np.float32))
        kept = NOISE.permutation(size) < round(share * size)
        return chain.store(np.where(kept, np.float32(1e20), np.float32(0)))

    def scale(*shape: int) -> str:
        return chain.store(np.full(shape, 0.002, np.float16))

    for _ in range(layers):
        weights = [
            chain.store(codes(D, F)),
            scale(D // GROUP, 2 * F),
            none,
            chain.store(codes(F, D // 2)),
            scale(F // GROUP, D),
            none,
        ]
        y = chain.add(
            "PackedFFN",
            [chain.x, *weights, norm(D, x_share), norm(F, z_share), threshold, threshold],
            library.DOMAIN,
            **form,
            D=D,
            F=F,
        )
        chain.end_layer(y)
    return chain


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def summary(times: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"best": min(times), "median": middle, "quarter": low, "three_quarters": high, "n": len(times)}


def measure(layers: int, threads: int, repeats: int) -> dict[str, Any]:
    """Each round runs everything, so whatever else the machine does meets all of them alike.

    Of each the second of two runs counts: the first finds the caches as the session before has left them.
    """
    chains: dict[str, Chain] = {"matmulnbits": matmulnbits(layers)}
    chains |= {f"ffn {share}": packed(layers, *sides) for share, sides in SHARES.items()}
    chains["prompt"] = packed(layers, 1, 1, prompt=True)
    sessions = {name: chain.session(threads) for name, chain in chains.items()}
    weights = NOISE.integers(0, 1 << 62, layers * 3 * D * F // 16, dtype=np.int64)
    parts = np.array_split(weights, threads)
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(threads) as pool:
        for rows in ROWS:
            x = {"x": NOISE.standard_normal((1, rows, D)).astype(np.float32)}
            runs = {n: functools.partial(s.run, None, x) for n, s in sessions.items() if n != "prompt" or rows > 16}
            if rows == 1:
                runs["read"] = lambda: list(pool.map(np.max, parts))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range((repeats if rows <= 16 else max(2, repeats // 8)) + 1):
                for name, run in runs.items():
                    took = [timed(run) / layers for _ in range(2 if rows <= 16 else 1)][-1]
                    if turn:  # the first one warms up
                        times[name].append(took)
            found[f"{rows} rows"] = {name: summary(values) for name, values in times.items()}
    for name in sessions:
        if name.startswith("ffn"):
            library.reset()
            sessions[name].run(None, {"x": NOISE.standard_normal((1, 1, D)).astype(np.float32)})
            found["1 rows"][name]["bytes"] = library.counts()[0] / layers
    found["1 rows"]["read"]["bytes"] = weights.nbytes / layers
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| rows | what | ms a layer, best (median) | GB/s or GFLOP/s at best |", "|---|---|---|---|"]
    for rows, measured in found.items():
        for name, m in measured.items():
            work = m.get("bytes", 6 * D * F * int(rows.split()[0])) / m["best"] / 1e6
            lines.append(f"| {rows.split()[0]} | {name} | {m['best']:.3f} ({m['median']:.3f}) | {work:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8, help="24 MB each; more than the last cache holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    library.built()
    found = measure(options.layers, options.threads, options.repeats)
    page = {
        "command": shlex.join(["python", *sys.argv]),
        "unit": "milliseconds a layer",
        "instructions": library.info()["instructions"],
        "environment": environment.describe(options.threads, {"onnxruntime": ort.__version__}),
        "measured": found,
    }
    write_report(options.out, page)
    print(table(found))


if __name__ == "__main__":
    main()
