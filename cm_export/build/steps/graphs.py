"""Stage `graphs`: traced graphs, the index of the weights and the recipe -> dense and sparse graphs, and the predictor."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from ...bundle import predictor, weights
from ...bundle.graph_facts import describe
from ...families import Family, Shape
from ...recipe.recipe import Recipe
from ...recipe.stored import StoredWeights
from ...surgery import pipeline
from ...surgery.neuron_constants import neuron_constants
from ..stage import Stage

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _recipe(job: "Job") -> Recipe:
    """The recipe without what no portable graph depends on: reading `engine` here fails, so that no key can miss it."""
    recipe = dataclasses.replace(
        job.recipe, model=None, revision=None, adapter=None, calibration=None, backend="", weights=StoredWeights()
    )
    return dataclasses.replace(recipe, engine=None)  # type: ignore[arg-type]  # reading it is to fail


def _inputs(job: "Job") -> dict[str, Any]:
    return {"recipe": _recipe(job).to_dict(), "calibration": job.measured}


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    job.progress("rewrite the graphs")
    recipe, family, shape = _recipe(job), job.family, job.shape
    file = weights.WeightFile(stages.file("weights", weights.FILE))
    constants = neuron_constants(recipe, file, family, shape, job.calibration)
    copies = None
    if recipe.neurons.in_decode:
        job.progress("fit the predictor")
        predictor.write(folder / predictor.FILE, file, family, shape)
        copies = weights.index(folder / predictor.FILE)
    traced = {name: stages.file("trace", f"{name}.onnx") for name in shape.traced}
    return _rewrite(traced, folder, file, family, shape, recipe, constants, copies)


def _rewrite(
    traced: dict[str, Path],
    folder: Path,
    file: weights.WeightFile,
    family: Family,
    shape: Shape,
    recipe: Recipe,
    constants: dict,
    copies: dict | None,
) -> dict:
    """Every graph into `folder`; returns their description and the log of passes."""
    passes, models = [], {}
    for name, graph in traced.items():
        bound, log = pipeline.dense(name, onnx.load(graph), file.tensors, family)
        models["vision" if name == "vision" else f"{name}_dense"] = bound
        passes += log
    models["prefill"], log = pipeline.sparse_prefill(models["prefill_dense"], family, shape, recipe, constants)
    passes += log
    models["decode"], log = pipeline.sparse_decode(models["decode_dense"], family, shape, recipe, copies, file)
    passes += log
    if recipe.has_turn:
        models["turn"], log = pipeline.turn(models["decode_dense"], family, shape, recipe, constants)
        passes += log
    for name, proto in models.items():
        onnx.save(proto, folder / f"{name}.onnx")
    return {
        "graphs": {name: describe(proto) for name, proto in models.items()},
        "passes": [p.__dict__ for p in passes],
    }


STAGE = Stage("graphs", ("trace", "weights"), _inputs, _run)
