"""A bundle that also reports what its dense model computes: a graph is rewritten in memory, its weights stay where they are."""

from collections.abc import Callable
from pathlib import Path

import onnx

from ..families import Family, Shape
from ..host.runner import Runner

Report = Callable[[onnx.ModelProto, Family, Shape], onnx.ModelProto]


def watching(runner: Runner, name: str, dense: str, report: Report) -> Runner:
    """The same bundle, whose graph `name` is its graph `dense` with the outputs that `report` adds (surgery/report_*.py)."""
    bundle = runner.bundle

    def graph(asked: str) -> Path | onnx.ModelProto:
        if asked != name:
            return bundle.graph(asked)
        return report(onnx.load(bundle.graph(dense), load_external_data=False), bundle.family, bundle.shape)

    return Runner(bundle, runner.backend.threads, runner.recipe, graph)
