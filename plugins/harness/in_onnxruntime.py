"""Runs the ops of a plugin library inside ONNX Runtime, on its CUDA provider, and an emulated library's on its CPU provider.

python -m cm_export.plugins.harness.in_onnxruntime --library artifacts/plugins/libcm_plugins.so
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort

from ..contract import Arrays
from ..places import DOMAIN
from .cases import Call, calls
from .limits import LIMITS

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def chosen() -> Iterator[Call]:
    """The calls of a plugin library but those in types that no graph for ONNX Runtime has."""
    return (c for c in calls() if c.dtype != "bfloat16" and not c.case.attributes.get("bits") and not c.shifted)


def session(
    call: Call, library: Path, provider: str = CPU, feeds: Arrays | None = None, **attributes: Any
) -> ort.InferenceSession:
    """One node of the op, with the types of a call's inputs (or of `feeds`), which gives what the op's function gives.

    `attributes`: instead of the call's. Raises what ONNX Runtime raises for a node that it or the op refuses.
    """
    feeds, outputs, own = feeds or call.feeds, list(call.expected), call.case.attributes | attributes
    node = onnx.helper.make_node(call.op.name, list(feeds), [*outputs, "workspace"], domain=DOMAIN, **own)
    kinds = {n: onnx.helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in feeds.items()}
    given = [onnx.helper.make_tensor_value_info(n, kinds[n], [None] * a.ndim) for n, a in feeds.items()]
    graph = onnx.helper.make_graph([node], "one", given, [onnx.ValueInfoProto(name=n) for n in outputs])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1  # what is wrong is raised
    options.register_custom_ops_library(str(library))
    made = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(made.SerializeToString(), options, providers=[provider])


def wrong(call: Call, library: Path, provider: str = CPU) -> list[str]:
    """Names of outputs that are further from the op's function than their type explains, or other bytes in a second run."""
    made, names, found = session(call, library, provider), list(call.expected), []
    runs = [made.run(names, call.feeds) for _ in range(2)]
    for name, first, second in zip(names, *runs, strict=True):
        expected = call.expected[name]
        off = np.abs(first.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))
        if first.tobytes() != second.tobytes() or not np.max(off) <= LIMITS[call.dtype][0]:
            found.append(name)
    return found


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--library", type=click.Path(path_type=Path, exists=True), required=True, help="libcm_plugins.so")
def main(library: Path) -> None:
    emulated = hasattr(ctypes.CDLL(str(library.resolve())), "cm_emulator_reverse")
    provider = CPU if emulated else CUDA
    if provider not in ort.get_available_providers():
        click.echo(f"NOT RUN: the installed ONNX Runtime {ort.__version__} has no {CUDA} (onnxruntime-gpu has)")
        return
    if hasattr(ort, "preload_dlls") and not emulated:
        ort.preload_dlls()  # of pip's packages of CUDA and cuDNN
    every = list(chosen())
    bad = {str(call): found for call in every if (found := wrong(call, library, provider))}
    for call, names in bad.items():
        click.echo(f"{call}: {', '.join(names)}")
    click.echo(f"calls in ONNX Runtime {ort.__version__}, {provider}: {len(bad)} of {len(every)} wrong")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
