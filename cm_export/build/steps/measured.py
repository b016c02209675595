"""Stage `measured`, where decode leaves out what weighs little or weights are stored in few bits: what the model's products read.

the dense model writes -> thresholds.safetensors (policy `active`; a calibration's own are taken over)
                       -> channels.safetensors, x of every product at some tokens: how weights are rounded depends on it
                       -> phrases.safetensors, the answers themselves, where they are answers to prompts
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...base import environment
from ...bundle import phrases, thresholds, weights
from ...calibrating.answers import Texts, answering, asking, own_text, prompts_of
from ...calibrating.thresholds import measure, watch
from ...host.request import Request
from ...host.runner import Runner
from .. import drift
from ..assemble import named
from ..stage import Stage
from ..under_way import UnderWay

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages

CHANNELS = "channels.safetensors"
PROMPTS = 24
PHRASES = 176  # prompts more, whose answers are only kept: what the model usually writes
TOKENS = 48  # of one answer
WRITING = 45.0  # seconds of computing, after which no further prompt is answered
SENSITIVITY_TOKENS, SENSITIVITY_SECONDS = 64, 60.0


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    known = job.calibration.active if job.calibration else None
    if known is not None and not job.recipe.weights.packs:
        thresholds.write(folder / thresholds.FILE, known)
        return {"about": "calibration"}
    job.progress("watch the model's products while it answers")
    runner = Runner(UnderWay(job, stages), job.threads, backend="onnxruntime")
    texts: Texts = []
    keeps = not (job.calibration and job.calibration.phrases)
    written = list(_written(job, runner, PROMPTS + PHRASES if keeps else PROMPTS, texts))
    if keeps and texts:
        phrases.write(folder / phrases.FILE, phrases.Phrases.of(texts))
    written = written[:PROMPTS]
    watched = watch(runner, written, job.progress)
    about, notes = f"{sum(len(answer) for _, answer in written)} tokens of {len(written)} answers, in the build", []
    if job.recipe.neurons.by_threshold:
        found = known or measure(runner, written, watched, SENSITIVITY_TOKENS, job.progress, SENSITIVITY_SECONDS)
        if not known and (found.sensitivity == 1).all():
            notes.append(
                "every product of decode leaves out an equal share, since trying them one by one would take this machine more "
                f"than {SENSITIVITY_SECONDS:.0f} s; `cm-export calibrate` takes the time it needs, and its file is better"
            )
        thresholds.write(folder / thresholds.FILE, found)
    if job.recipe.weights.packs:
        weights.write_arrays(folder / CHANNELS, {f"site.{i}": x for i, x in enumerate(watched.some)})
    return {"about": "calibration" if known else about, "notes": notes}


def _written(job: "Job", runner: Runner, most: int, texts: Texts) -> Iterator[tuple[Request, np.ndarray]]:
    """Answers of the dense model: to the training questions of a demo model, else to beginnings that are made up."""
    started = environment.worked(job.threads)
    prompts, _ = prompts_of(None, named(job.source), most, seed=0)
    asked: Iterator[Any]
    if prompts:
        asked = asking(runner, prompts)
    else:
        seen = drift.made_up(runner, job.config, range(1000, 1000 + PROMPTS)) if job.tower else iter(())
        both = itertools.zip_longest(seen, own_text(runner, PROMPTS))
        asked = (request for pair in both for request in pair if request is not None)
    for request, answer in answering(runner, asked, TOKENS, drawn=not prompts, texts=texts):
        yield request, answer
        if environment.worked(job.threads) - started > WRITING:
            return


def _needed(job: "Job") -> bool:
    return job.recipe.neurons.by_threshold or job.recipe.weights.packs


def _inputs(job: "Job") -> dict[str, Any]:
    wanted = {"thresholds": job.recipe.neurons.by_threshold, "channels": job.recipe.weights.packs}
    return {"calibration": job.measured, "model": named(job.source), **wanted}


STAGE = Stage("measured", ("weights", "graphs"), _inputs, _run, needed=_needed)
