"""Finished stages become the bundle at --out, in one step: graphs are copied, large files linked (slim.py), the manifest sealed.

.engine.plan.stages/*   ->   .engine.plan.x1y2z3ab.tmp/   -- gates on answers, if any are required -->   engine.plan/
"""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..base import disk
from ..bundle import bundle as bundles
from ..bundle import directory, packed, phrases, predictor, thresholds, weights
from ..bundle.calibration import FILE as CALIBRATION
from ..bundle.graph_facts import links
from ..source.checkpoint import Checkpoint
from . import engines, kept, quality, slim
from .job import Job
from .quality import Requirement
from .stages import Stages

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime", "numpy")


def write_bundle(out: Path, job: Job, stages: Stages, required: Requirement | None) -> dict[str, Any]:
    """Write `out` and return its manifest. Raises GateFailed, with `out` as it was, if answers are not as required."""
    job.progress("assemble the bundle")
    manifest = _manifest(job, stages)
    with directory.assemble(out) as folder:
        with disk.writing(out.parent):
            known = _files(folder, job, stages)
            bundles.write_manifest(folder, manifest | {"known_sha256": known})
        if required:
            found = quality.check(folder, required, job.recipe, job.threads, job.progress)
            manifest["gates"] = manifest["gates"] + found
            (folder / bundles.MANIFEST).unlink()
            bundles.write_manifest(folder, manifest | {"known_sha256": known})
    (stages.folder / "packed" / packed.FILE).unlink(missing_ok=True)
    if slim.is_slim(job):
        stages.forget("weights")  # they lie in no bundle, and another build reads the checkpoint again
    # One name is left for the weights: readers of external data refuse files with several hard links.
    (stages.folder / "weights" / weights.FILE).unlink(missing_ok=True)
    return bundles.read_manifest(out)


def _manifest(job: Job, stages: Stages) -> dict[str, Any]:
    source, graphs = job.source, stages.state("graphs")
    built = stages.state("engines") if job.aim else {}
    entries = stages.state("packed")["entries"] if job.recipe.weights.packs else {}
    codes = kept.rows(job.codes, entries) if job.codes else None
    return {
        "tool": {"name": "cm-export", "version": __version__},
        "model": {
            "source": named(source),
            "type": source.model_type,
            "revision": source.revision,
            "files": source.identity,
            "adapter": job.merge.to_dict() if job.merge else None,
            "config": job.config,
            "embedding": job.family.embedding,  # the host looks token embeddings up in the weight file
        },
        "recipe": job.recipe.to_dict()
        | {
            "model": None,
            "calibration": CALIBRATION if job.calibration else None,
            # A name, which no rebuild from elsewhere finds: better than one without the adapter.
            "adapter": source.adapter.path.name if source.adapter else None,
        },
        "generation": job.generation.settings,
        "notes": [
            *job.notes,
            *(row["said"] for row in codes or ()),
            *job.generation.notes,
            *_unread(stages.state("weights").get("unread", [])),
            *(stages.state("measured").get("notes", []) if "measured" in stages.keys else []),
        ],
        "versions": {n: version(n) for n in _LIBRARIES}
        | {"python": platform.python_version(), "platform": platform.machine()},
        "graphs": graphs["graphs"],
        "passes": graphs["passes"],
        "gates": stages.state("gates")["gates"] + built.get("gates", []),
        "drift": stages.state("gates")["drift"],
        "weights_drift": stages.state("gates").get("weights_drift"),
        "engines": {k: v for k, v in built.items() if k not in ("sha256", "gates")} or None,
        "links": links(job.shape.layers, graphs["graphs"]),
        "measured": stages.state("measured")["about"] if "measured" in stages.keys else None,
        "codes": codes,
        "packed": stages.state("packed")["entries"] if job.recipe.weights.packs else None,
        "stages": {name: stages.keys[name] for name in ("trace", "weights", "graphs")},
    }


def _unread(tensors: list[str]) -> list[str]:
    if not tensors:
        return []
    some = ", ".join(tensors[:3])
    return [f"{len(tensors)} tensors of the checkpoint are read by neither transformers' class nor here, e.g. {some}"]


def named(source: Checkpoint) -> str:
    """What a bundle calls its model: as it was given, of a directory its name."""
    return source.path.name if Path(source.source).exists() else source.source


def _files(folder: Path, job: Job, stages: Stages) -> dict[str, str]:
    """Put the files of a bundle into `folder`; returns the hashes that the stages know already."""
    known = {}
    is_slim = slim.is_slim(job)
    copied = [] if is_slim else [f"{name}.onnx" for name in stages.state("graphs")["graphs"]]
    if job.recipe.neurons.in_decode:
        copied.append(predictor.FILE)
    for name in copied:
        shutil.copyfile(stages.file("graphs", name), folder / name)
        known[name] = stages.state("graphs")["sha256"][name]
    known[weights.FILE] = slim.write(folder, job, stages) if is_slim else _whole_weights(folder, stages)
    if job.recipe.neurons.by_threshold:
        shutil.copyfile(stages.file("measured", thresholds.FILE), folder / thresholds.FILE)
        known[thresholds.FILE] = stages.state("measured")["sha256"][thresholds.FILE]
    if written := stages.state("measured")["sha256"].get(phrases.FILE) if "measured" in stages.keys else None:
        shutil.copyfile(stages.file("measured", phrases.FILE), folder / phrases.FILE)
        known[phrases.FILE] = written
    if job.recipe.weights.packs:
        disk.link_or_copy(stages.file("packed", packed.FILE), folder / packed.FILE)
        known[packed.FILE] = stages.state("packed")["sha256"][packed.FILE]
    shutil.copytree(stages.folder / "weights" / "processor", folder / "processor")
    for name, digest in (stages.state("engines")["sha256"] if job.aim else {}).items():
        (folder / engines.FOLDER).mkdir(exist_ok=True)
        disk.link_or_copy(stages.file("engines", name), folder / engines.FOLDER / name)
        known[f"{engines.FOLDER}/{name}"] = digest
    if job.calibration:
        assert job.recipe.calibration is not None and job.measured is not None  # it was read from there
        shutil.copyfile(job.recipe.calibration, folder / CALIBRATION)
        known[CALIBRATION] = job.measured
    return known


def _whole_weights(folder: Path, stages: Stages) -> str:
    """Put the weight file of the stage into `folder`; returns its hash."""
    stored = stages.file("weights", weights.FILE)
    if stored.parent in (stages.folder / "weights", stages.bundle):
        disk.link_or_copy(stored, folder / weights.FILE)
    else:  # behind a link of an older bundle: not ours to give a second name
        shutil.copyfile(stored, folder / weights.FILE)
    known: str = stages.state("weights")["sha256"][weights.FILE]
    return known
