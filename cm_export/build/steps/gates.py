"""Stage `gates`: graphs, weights and PyTorch's answers -> results of the gates; one that fails ends the build."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...backends.onnxruntime.backend import Backend
from ...bundle import predictor, weights
from ...bundle.names import core_row_names
from ...source import model
from .. import gates
from ..stage import Stage

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    job.progress("prove the graphs against PyTorch")
    in_decode = job.recipe.neurons.in_decode
    copies = weights.WeightFile(stages.file("graphs", predictor.FILE)) if in_decode else None
    file = weights.WeightFile(stages.file("weights", weights.FILE))
    rows = core_row_names(job.family, job.shape.layers)
    backend = Backend(lambda n: stages.file("graphs", f"{n}.onnx"), file, job.threads, copies, rows)
    reference = model.read_reference(stages.folder / "weights")
    subject = gates.Subject(
        backend, job.family, job.shape, job.tower, job.recipe, job.inputs, reference, job.calibration
    )
    results = gates.run_gates(subject)
    return {"gates": [g.to_dict() for g in results]}


STAGE = Stage("gates", ("weights", "graphs"), lambda job: {"threads": job.threads}, _run)
