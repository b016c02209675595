"""A bundle under way, read from the stages of its build: what can be asked of a finished one, asked before it is written.

.engine.plan.stages/graphs/*.onnx, weights/*  ->  UnderWay(job, stages)  ->  Runner, Chat
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import packed, predictor, thresholds, weights
from ..bundle.bundle import Bundle

if TYPE_CHECKING:
    from .job import Job
    from .stages import Stages


class UnderWay(Bundle):
    """Nothing of it is sealed yet: its manifest says only how answers are chosen, and the stages have checked their own files."""

    def __init__(self, job: "Job", stages: "Stages", with_packed: bool = True):
        """`with_packed`: False reads float32 weights where low-bit ones are there."""
        self.path, self._stages, self._with_packed = stages.folder, stages, with_packed
        self.family, self.shape, self.tower, self.config = job.family, job.shape, job.tower, job.config
        self.recipe, self.calibration, self.phrases = job.recipe, job.calibration, None
        self.weights = weights.WeightFile(stages.file("weights", weights.FILE))
        self.manifest = {"generation": job.generation.settings}
        if job.recipe.neurons.in_decode:
            self.predictor = weights.WeightFile(stages.file("graphs", predictor.FILE))

    @cached_property
    def packed(self) -> packed.Packed | None:
        """Those of the stage that has written them; None before it has run."""
        if not self._with_packed or "packed" not in self._stages.states:
            return None
        return packed.Packed(self._stages.file("packed", packed.FILE), self._stages.state("packed")["entries"])

    @cached_property
    def thresholds(self) -> thresholds.Thresholds | None:
        """Those of the stage that measured them, which has run by now."""
        return thresholds.read(self._stages.file("measured", thresholds.FILE))

    def graph(self, name: str) -> Path:
        """The file of one graph."""
        return self._stages.file("graphs", f"{name}.onnx")

    def processor(self, name: str) -> Path | None:
        """A tokenizer or processor file, or None if the checkpoint had none."""
        file = self.path / "weights" / "processor" / name
        return file if file.is_file() else None

    def wait_read_verified(self) -> None:
        """As `wait_verified`."""

    def wait_verified(self) -> None:
        """A stage is taken over only when its files match their hashes, so there is nothing to wait for."""
