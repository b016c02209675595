"""Build a bundle: checkpoint -> weights, trace -> surgery -> gates -> `--out`, in resumable stages.

stage      reads                         writes
weights    checkpoint                    weights.safetensors, processor files, PyTorch's answers to the probe
trace      configuration                 prefill, decode, and vision where there is one, traced beside the loading of weights
graphs     trace, weights, recipe        those, sparse prefill and decode, turn where a later question can be asked
gates      graphs, weights, reference    gate results, a failed gate ends the build; how far the recipe moves the model
engines    graphs, weights               with a TensorRT backend: engines, proved before and checked after
"""

import contextlib
import os
import resource
import shutil
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..base import environment
from ..base.errors import InputError
from ..base.hashes import key_of
from ..base.metrics import check_floor
from ..bundle import bundle as bundles
from ..recipe.recipe import Recipe
from ..source import checkpoint
from . import drift, sources
from .assemble import write_bundle
from .job import Job, Step, prepare
from .quality import Requirement
from .stages import Stages
from .steps import engines, gates, graphs, trace, weights

STAGES = (weights.STAGE, trace.STAGE, graphs.STAGE, gates.STAGE, engines.STAGE)


def build(
    model: str,
    out: Path,
    recipe: Recipe,
    progress: Step = lambda what, done=None, total=None: None,
    force: bool = False,
    work_dir: Path | None = None,
    threads: int = 0,
    required: Requirement | None = None,
    require_agreement: float | None = None,
) -> dict[str, Any]:
    """Write the bundle `out` and return its manifest with `seconds`, `peak_memory_bytes`, `stages_reused`, `notes`.

    Raises InputError for what the user can mend, GateFailed when the export is not right or its answers are not as
    `required`, or less than `require_agreement` of its next tokens are the dense model's; `out` is untouched then.
    """
    check_floor(require_agreement, "required agreement")
    started, out = time.perf_counter(), Path(os.path.abspath(out))
    bundles.check_out(out)
    progress("check the checkpoint")
    source = checkpoint.resolve(model, recipe.revision)
    stages = Stages(work_dir or out.with_name(f".{out.name}.stages"), force, out)
    with stages.lock():
        bundles.sweep(out)
        _check_disk(source, out)
        job = prepare(source, recipe, threads, progress)
        manifest = _run(job, out, stages, required, require_agreement)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return manifest | {
        "path": str(out),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": max(environment.peak_memory_bytes(), children),
        "stages_reused": stages.reused,
    }


def _run(job: Job, out: Path, stages: Stages, required: Requirement | None, agreement: float | None) -> dict[str, Any]:
    """Every stage that the job needs, in order and resumed where its key is unchanged; then the bundle's manifest."""
    wanted = [stage for stage in STAGES if stage.needed(job)]
    keys = stage_keys(job)
    with contextlib.ExitStack() as beside:
        begun = {}
        for stage in wanted:
            if stage.begin and (stages.force or stages.finished(stage.name, keys[stage.name]) is None):
                staging = stages.folder / f"{stage.name}-{os.getpid()}.tmp"
                begun[stage.name] = beside.enter_context(stage.begin(job, staging))
        for stage in wanted:
            more = {"begun": begun.pop(stage.name)} if stage.name in begun else {}
            stages.run(stage.name, keys[stage.name], partial(stage.run, job=job, stages=stages, **more))
            if not begun:
                beside.close()  # processes that wait for nothing would keep their memory
            if stage is gates.STAGE:  # before engines, which may take an hour
                drift.require(stages.state(stage.name)["drift"], agreement)
    manifest = write_bundle(out, job, stages, required)
    return manifest | {"notes": drift.notes(manifest["drift"], job.recipe)}


def stage_keys(job: Job) -> dict[str, str]:
    """What each stage's result depends on, as a hash, by the name of the stage."""
    keys: dict[str, str] = {}
    for stage in (s for s in STAGES if s.needed(job)):
        code = stage.run.__module__
        keys[stage.name] = key_of(
            reads={name: keys[name] for name in stage.reads},
            inputs=stage.inputs(job),
            versions=sources.libraries(code) | {name: version(name) for name in stage.libraries},
            program=sources.digest(code),
            family=sources.own_file(job.family),
        )
    return keys


def _check_disk(source: checkpoint.Checkpoint, out: Path) -> None:
    """Refuse early when the weights cannot fit: float32 takes up to twice the bytes of a half-precision checkpoint."""
    size = 2 * sum((source.path / n).stat().st_size for n in source.files if n.endswith(".safetensors"))
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise InputError(
            f"needs about {size / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free", where=out.parent, fix="free some"
        )
