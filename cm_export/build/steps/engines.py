"""Stage `engines`, with a TensorRT backend: graphs and weights -> engines, proved before and checked after."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import predictor, weights
from .. import engines
from ..stage import Stage

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    assert job.aim is not None  # this stage is needed only then
    names, file = tuple(stages.state("graphs")["graphs"]), weights.WeightFile(stages.file("weights", weights.FILE))
    in_decode = job.recipe.neurons.in_decode
    copies = weights.WeightFile(stages.file("graphs", predictor.FILE)) if in_decode else None
    source = engines.Source(
        lambda n: stages.file("graphs", f"{n}.onnx"), names, file, job.shape, job.recipe, job.tower, copies
    )
    piece = stages.pieces("engines")
    return engines.build_engines(source, job.family, job.inputs, folder, job.aim, job.progress, job.threads, piece)


def _inputs(job: "Job") -> dict[str, Any]:
    assert job.aim is not None  # this stage is needed only then
    return {"backend": job.aim.backend, **job.aim.key}


STAGE = Stage("engines", ("weights", "graphs"), _inputs, _run, needed=lambda job: job.aim is not None)
