"""Stage `gates`: graphs, weights and PyTorch's answers -> results of the gates, one that fails ends the build; the drift."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...backends.onnxruntime.backend import Backend
from ...bundle import predictor, weights
from ...bundle.names import core_row_names
from ...host.runner import Runner
from ...source import model
from .. import drift, gates
from ..stage import Stage
from ..under_way import UnderWay

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    job.progress("prove the graphs against PyTorch")
    in_decode = job.recipe.neurons.in_decode
    copies = weights.WeightFile(stages.file("graphs", predictor.FILE)) if in_decode else None
    file = weights.WeightFile(stages.file("weights", weights.FILE))
    rows = core_row_names(job.family, job.shape.layers)
    backend = Backend(
        lambda n: stages.file("graphs", f"{n}.onnx"), file, job.threads, copies, rows, heads=job.shape.heads
    )
    reference = model.read_reference(stages.folder / "weights")
    results = gates.run_gates(
        gates.Subject(backend, job.family, job.shape, job.tower, job.recipe, job.inputs, reference)
    )
    runner = Runner(UnderWay(job, stages), job.threads, backend=backend.name)  # whatever the bundle will run on
    found = drift.measure(runner, job.config, job.progress)
    results += found.gates()
    state: dict[str, Any] = {"drift": found.to_dict()}
    if job.recipe.weights.packs:
        exact = Runner(UnderWay(job, stages, with_packed=False), job.threads, backend=backend.name)
        rounded = drift.of_weights(exact, runner, job.config, job.progress)
        results += rounded.gates("weights", "float32", job.recipe.weights.least_agreement)
        state["weights_drift"] = rounded.to_dict()
    return state | {"gates": [g.to_dict() for g in results]}


def _inputs(job: "Job") -> dict[str, Any]:
    weights = job.recipe.weights
    return {"threads": job.threads, "least_agreement": weights.least_agreement, "cache": weights.cache}


STAGE = Stage("gates", ("weights", "graphs", "measured", "packed"), _inputs, _run)
