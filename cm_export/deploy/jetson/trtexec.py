"""How trtexec is called for each graph, as data: the archive's manifest carries these words, the script passes them on.

    profile {x: [[1,2], [1,8], [1,64]]}  ->  --minShapes=x:1x2 --optShapes=x:1x8 --maxShapes=x:1x64

The script looks for every one of them in `trtexec --help` of the device before the first build.
"""

from typing import Any

from ...backends.tensorrt.targets import Target

# All exist from 10.3 on. Without `detailed` the list of layers has names only, not the types by which plugins are found.
BUILD = ("--skipInference", "--profilingVerbosity=detailed", "--dumpLayerInfo")
ONCE = ("--iterations=1", "--warmUp=0", "--duration=0", "--avgRuns=1")
# With transfers: without them (--noDataTransfers) the ids that a plugin reads might never reach the device.
BENCH = ("--iterations=50", "--warmUp=500", "--duration=5", "--useSpinWait")
# What the script itself adds, with paths that only the device knows.
LATER = (
    "--onnx", "--saveEngine", "--loadEngine", "--exportLayerInfo", "--dynamicPlugins", "--loadInputs", "--shapes",
    "--exportOutput", "--memPoolSize",
)  # fmt: skip


def build_words(graph: dict[str, Any], target: Target, level: int) -> list[str]:
    """Words of the call that builds one graph (as `write_graphs` describes it), besides the paths."""
    words = [*BUILD, f"--builderOptimizationLevel={level}"]
    words += ["--stronglyTyped"] if target.typed_flag else []  # from 11 on there is nothing else, and no such flag
    dynamic = {v["name"] for v in graph["inputs"] if any(isinstance(axis, str) for axis in v["shape"])}
    profile = {n: shapes for n, shapes in graph["profile"].items() if n in dynamic}
    if profile:
        for flag, i in (("--minShapes", 0), ("--optShapes", 1), ("--maxShapes", 2)):
            words.append(f"{flag}=" + shapes({n: ranges[i] for n, ranges in profile.items()}))
    return words


def shapes(by_name: dict[str, list[int]]) -> str:
    """`x:1x2,y:3`, as --shapes and the profile flags take them."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in by_name.items())


def flags(words: list[str]) -> list[str]:
    """The flags among some words, and those that the script adds: all must be known to the device's trtexec."""
    return sorted({w.partition("=")[0] for w in (*words, *ONCE, *BENCH)} | set(LATER))
