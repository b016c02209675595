"""Whether a bundle fits Triton: which of its graphs become models, which cannot and why, and in which container they run.

demo.plan                          vision, prefill, decode, ... as backend: "onnxruntime", 25.10 or newer
engines of TensorRT 10.13.3        the same as platform: "tensorrt_plan", 25.09
engines of TensorRT 10.15 on       no decode: its cache is written where it is read; `vlm` runs that engine itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...base.errors import InputError
from ...bundle.bundle import Bundle
from ...bundle.weights import FILE as WEIGHTS
from ...serving import triton_graphs
from ...serving.triton_settings import BLS
from . import containers
from .config import ONNXRUNTIME, TENSORRT

ELSEWHERE = "deploy its portable graphs: --backend onnxruntime"


@dataclass(frozen=True)
class Plan:
    """What a repository of one bundle holds."""

    backend: str  # what runs the graphs within `vlm`
    how: str  # what runs them as models
    container: containers.Container
    graphs: Mapping[str, Any]  # as the manifest describes them
    left_out: Mapping[str, str]  # graph -> why it is no model
    tensorrt: str | None = None  # version
    architecture: str | None = None
    plugins: str | None = None  # the library of plugins, relative to the bundle

    def files(self, graph: str) -> dict[str, str]:
        """File in the model's folder -> file of the bundle."""
        if self.how == TENSORRT:
            return {"model.plan": f"engines/{graph}.plan"}
        return {"model.onnx": f"{graph}.onnx", WEIGHTS: WEIGHTS}

    def to_dict(self) -> dict[str, Any]:
        """For --json and the record."""
        return {
            "backend": self.backend,
            "graphs": {name: self.how for name in self.graphs},
            "left_out": dict(self.left_out),
            "container": self.container.image,
            "container_known": self.container.known,
            "tensorrt": self.tensorrt,
        }


def plan(bundle: Bundle, backend: str | None, execution: str) -> Plan:
    """Raises InputError for a bundle that Triton cannot run this way."""
    backend = backend or bundle.recipe.backend
    engines = bundle.manifest.get("engines")
    if backend == ONNXRUNTIME:
        made = Plan(backend, ONNXRUNTIME, containers.of_graphs(), *_models(bundle, None, bundle.manifest["graphs"]))
    elif backend != "tensorrt":
        what = f"runs on {backend}, for which Triton has no backend"
        raise InputError(what, where=bundle.path, fix=f"build it with --backend tensorrt, or {ELSEWHERE}")
    elif not engines or engines["backend"] != backend:
        fix = f"build it with --backend tensorrt, or {ELSEWHERE}"
        raise InputError("holds no engines of TensorRT", where=bundle.path, fix=fix)
    elif bundle.recipe.engine.strip_weights:
        what = "its engines hold no weights, and nothing in Triton refits them"
        raise InputError(what, where=bundle.path, fix=f"build it without --strip-weights, or {ELSEWHERE}")
    else:
        library = f"engines/{engines['plugins']['name']}" if engines.get("plugins") else None
        container, described = containers.of_engines(engines["version"]), engines["graphs"]
        models = _models(bundle, engines, described)
        made = Plan(backend, TENSORRT, container, *models, engines["version"], engines["architecture"], library)
    if execution == BLS:
        triton_graphs.check(bundle, backend)
    return made


def _models(bundle: Bundle, engines: Any, described: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    left_out = triton_graphs.left_out(bundle, engines, described)
    return {name: graph for name, graph in described.items() if name not in left_out}, left_out


def check_shares(bundle: Bundle, neuron_share: float | None, token_share: float | None) -> None:
    """Raises InputError for a share of something that the bundle does not prune."""
    for what, share in (("neuron", neuron_share), ("token", token_share)):
        if share is not None and getattr(bundle.recipe, f"{what}s").policy == "dense":
            fix = "leave it out, or build the bundle with another policy"
            raise InputError(f"the bundle prunes no {what}s", where=f"--{what}-share", fix=fix)
