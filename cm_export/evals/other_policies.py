"""The same bundle under other policies: its dense graphs are rewritten in memory, its weights stay where they are."""

from pathlib import Path
from typing import Any

import onnx

from ..host.backend import DEFAULT
from ..host.loaded import LoadedBundle
from ..host.runner import Runner
from ..recipe.recipe import Recipe
from ..surgery import pipeline
from ..surgery.neuron_constants import neuron_constants


def with_policies(runner: Runner, recipe: Recipe) -> LoadedBundle:
    """A bundle that answers as one built with `recipe` would. Raises InputError for a recipe that its model cannot follow."""
    bundle = runner.bundle
    pipeline.check_recipe(recipe, bundle.shape)

    def graph(name: str) -> Path | Any:
        if name not in ("prefill", "decode", "turn"):
            return bundle.graph(name)
        source = "prefill_dense" if name == "prefill" else "decode_dense"
        dense = onnx.load(bundle.graph(source), load_external_data=False)
        if name == "decode":
            copies = bundle.predictor.tensors if recipe.neurons.in_decode else None
            return pipeline.sparse_decode(dense, bundle.family, bundle.shape, recipe, copies, bundle.weights)[0]
        constants = neuron_constants(recipe, bundle.weights, bundle.family, bundle.shape, bundle.calibration)
        rewrite = pipeline.turn if name == "turn" else pipeline.sparse_prefill
        return rewrite(dense, bundle.family, bundle.shape, recipe, constants)[0]

    device = runner.device if runner.backend.name == DEFAULT else None  # engines' device says nothing of ONNX Runtime's
    return LoadedBundle(bundle, runner.backend.threads, recipe, graph, device=device)
