"""Build a bundle: checkpoint -> weights, trace -> surgery -> gates -> `--out`, in resumable stages.

stage      reads                         writes
weights    checkpoint                    weights.safetensors, processor files, PyTorch's answers to the probe
trace      configuration                 prefill, decode, and vision where there is one, traced beside the loading of weights
graphs     trace, weights, recipe        those, sparse prefill and decode, turn where a later question can be asked
measured   graphs, weights               where thresholds or low bits are asked for: what the model's products read
packed     graphs, weights, measured     where low bits are asked for: packed.safetensors
gates      graphs, weights, reference    gate results, a failed gate ends the build; how far the recipe moves the model
engines    graphs, weights               with a TensorRT backend: engines, proved before and checked after
"""

import contextlib
import os
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..base import disk, environment, lock
from ..base.errors import InputError
from ..base.hashes import key_of
from ..base.metrics import check_floor
from ..bundle import directory, predictor
from ..bundle import weights as weight_files
from ..recipe.recipe import Recipe
from ..source import checkpoint
from . import drift, sources
from .assemble import named, write_bundle
from .engines import lowered_bytes
from .job import Job, Step, prepare
from .quality import Requirement
from .stages import Stages
from .steps import engines, gates, graphs, measured, packed, trace, weights

STAGES = (weights.STAGE, trace.STAGE, graphs.STAGE, measured.STAGE, packed.STAGE, gates.STAGE, engines.STAGE)


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
    `notes` of the result: sentences that the user should read, such as what was kept of an older directory.
    """
    check_floor(require_agreement, "required agreement")
    started, out = time.perf_counter(), directory.given(out)
    directory.check_out(out)
    work = Path(os.path.abspath(work_dir)) if work_dir else out.with_name(f".{out.name}.stages")
    one, other = (Path(os.path.realpath(p)) for p in (work, out))
    if one == other or other in one.parents or one in other.parents:
        fix = "give a --work-dir that neither holds --out nor lies in it"
        raise InputError("the stages and the bundle would lie in each other", where=work, fix=fix)
    progress("check the checkpoint")
    source = checkpoint.resolve(model, recipe.revision, Path(recipe.adapter) if recipe.adapter else None)
    notes = _replaced(out, source, force)
    with contextlib.ExitStack() as held:
        held.enter_context(disk.made(out.parent))
        busy = InputError("another build of this bundle is running", where=out, fix="wait for it")
        unlocked = [held.enter_context(lock.alone(out.with_name(f".{out.name}.lock"), busy, passing=True))]
        stages = Stages(work, force, out)
        unlocked.append(held.enter_context(stages.lock()))
        notes += [note for note in unlocked if note]
        directory.sweep(out)
        job = prepare(source, recipe, threads, progress)
        notes += _kept(out)
        manifest = _run(job, out, stages, required, require_agreement)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return manifest | {
        "path": str(out),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": max(environment.peak_memory_bytes(), children),
        "stages_reused": stages.reused,
        "notes": [*notes, *manifest["notes"]],
    }


def _replaced(out: Path, source: checkpoint.Checkpoint, force: bool) -> list[str]:
    """A note where the bundle at `out` is of other weights of the same name. Raises InputError for another model's."""
    old, name = directory.model_of(out), named(source)
    if old is None or _weights(old["files"]) == _weights(source.identity):
        return []
    if str(old.get("source")).partition("@")[0] == name.partition("@")[0]:
        return [f"{out} was built from other weights of {name}, and is replaced"]
    if not force:
        fix = "give another --out, or --force to replace it"
        raise InputError(f"holds a bundle of another model, {old.get('source')}", where=out, fix=fix)
    return [f"{out} was a bundle of {old.get('source')}, and is replaced"]


def _weights(files: dict[str, str]) -> set[str]:
    return {digest for name, digest in files.items() if name.endswith(".safetensors")}


def _kept(out: Path) -> list[str]:
    """A note on what the user has put into the older bundle."""
    tops = sorted({p.parts[0] for p in directory.foreign(out)})
    more = f" and {len(tops) - 3} more" if len(tops) > 3 else ""
    return [f"{', '.join(tops[:3])}{more} in {out} {'is' if len(tops) == 1 else 'are'} kept"] if tops else []


def _run(job: Job, out: Path, stages: Stages, required: Requirement | None, agreement: float | None) -> dict[str, Any]:
    """Every stage that the job needs, in order and resumed where its key is unchanged; then the bundle's manifest."""
    wanted = [stage for stage in STAGES if stage.needed(job)]
    keys = stage_keys(job)
    _check_disk(job, keys, stages, out)
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
    return manifest | {"notes": [*manifest["notes"], *drift.notes(manifest["drift"], job.recipe)]}


def stage_keys(job: Job) -> dict[str, str]:
    """What each stage's result depends on, as a hash, by the name of the stage."""
    keys: dict[str, str] = {}
    for stage in (s for s in STAGES if s.needed(job)):
        code = stage.run.__module__
        keys[stage.name] = key_of(
            reads={name: keys[name] for name in stage.reads if name in keys},  # others were not needed
            inputs=stage.inputs(job),
            versions=sources.libraries(code) | {name: sources.version(name) for name in stage.libraries},
            program=sources.digest(code),
            family=sources.own_file(job.family),
        )
    return keys


def _check_disk(job: Job, keys: dict[str, str], stages: Stages, out: Path) -> None:
    """Refuse early when the large files cannot fit, counted where each is written. Raises InputError.

    Weights are float32, made among the stages and linked into the bundle; across file systems they are copied. Engines are
    checked again when their sizes are known.
    """
    size = job.codes.float32_bytes if job.codes else checkpoint.float32_bytes(job.source)
    copies = int(predictor.copy_bytes(job.shape)) if job.recipe.neurons.in_decode else 0
    new = {name for name, key in keys.items() if stages.force or stages.recorded(name, key) is None}
    needs = {
        "weights": 2 * size if job.codes else size,
        "graphs": copies,
    }  # codes become a float checkpoint for a while
    if job.aim:
        needs["engines"] = lowered_bytes(size, job.recipe.engine)
    made = stages.folder if "weights" in new else stages.file("weights", weight_files.FILE).parent
    linked = os.stat(disk.existing(made)).st_dev == os.stat(out.parent).st_dev
    disk.require(
        disk.Need(stages.folder, sum(n for name, n in needs.items() if name in new), "--work-dir"),
        disk.Need(out.parent, copies + (0 if linked else size), "--out"),
    )
