"""Stage `weights`: checkpoint -> weights.safetensors, processor files, PyTorch's answers to the probe."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...source import model
from ..stage import Stage, fingerprint

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _inputs(job: "Job") -> dict[str, Any]:
    # Without an order of neurons it is the same for every recipe.
    order = {} if job.order is None else {"order": fingerprint(job.order)}
    return {"files": job.source.identity, "probe": fingerprint(job.inputs), **order}


def _run(folder: Path, job: "Job", stages: "Stages") -> dict[str, Any]:
    job.progress("load the checkpoint")
    merged = {"merged": job.merge.apply} if job.merge else {}
    with contextlib.ExitStack() as stack:
        path = job.source.path
        if job.codes is not None:
            path = stack.enter_context(job.codes.source.in_float32(folder, job.codes.model.has, job.progress))
        return model.write_weights(path, job.family, folder, job.tower, job.inputs, job.progress, job.order, **merged)


STAGE = Stage("weights", (), _inputs, _run)
