"""Stage `thresholds`, where decode leaves out what weighs little: the calibration's, or measured now on what the model writes."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import thresholds
from ...calibrating.answers import answering, asking, own_text, prompts_of
from ...calibrating.thresholds import measure
from ...host.request import Request
from ...host.runner import Runner
from .. import drift
from ..assemble import named
from ..stage import Stage
from ..under_way import UnderWay

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages

PROMPTS = 16
TOKENS = 48  # of one answer
WRITING = 45.0  # seconds, after which no further prompt is answered
SENSITIVITY_TOKENS, SENSITIVITY_SECONDS = 64, 60.0


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    found = job.calibration.active if job.calibration else None
    about = "calibration"
    if found is None:
        job.progress("measure thresholds on the model's own answers")
        runner = Runner(UnderWay(job, stages), job.threads, backend="onnxruntime")
        written = list(_written(job, runner))
        found = measure(runner, written, SENSITIVITY_TOKENS, job.progress, SENSITIVITY_SECONDS)
        about = f"{sum(len(answer) for _, answer in written)} tokens of {len(written)} answers, in the build"
    thresholds.write(folder / thresholds.FILE, found)
    return {"about": about}


def _written(job: "Job", runner: Runner) -> Iterator[tuple[Request, np.ndarray]]:
    """Answers of the dense model: to the training questions of a demo model, else to beginnings that are made up."""
    started, (prompts, _) = time.perf_counter(), prompts_of(None, named(job.source), PROMPTS, seed=0)
    asked: Iterator[Any]
    if prompts:
        asked = asking(runner, prompts)
    else:
        texts = own_text(runner, PROMPTS)
        seen = drift.made_up(runner, job.config, range(1000, 1000 + PROMPTS)) if job.tower else iter(())
        asked = itertools.chain.from_iterable(itertools.zip_longest(seen, texts))
    for request, answer in answering(runner, (r for r in asked if r is not None), TOKENS, drawn=not prompts):
        yield request, answer
        if time.perf_counter() - started > WRITING:
            return


STAGE = Stage(
    "thresholds", ("weights", "graphs"), lambda job: {"calibration": job.measured, "model": named(job.source)}, _run,
    needed=lambda job: job.recipe.neurons.by_threshold,
)  # fmt: skip
