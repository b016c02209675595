"""A bundle of low-bit weights holds float32 numbers of those weights only that some graph of it still reads.

weights.safetensors of the stage -> the same without what packed.safetensors holds
graphs                           -> point at what is left; for the others at float32.safetensors (bundle/unpacked.py), which is
                                    not there, so that no runtime takes other bytes for them

Every other verb that reads such a weight gets the numbers that its codes stand for.
"""

from functools import partial
from pathlib import Path
from typing import Any

import onnx

from ..backends.onnxruntime.backend import Backend
from ..bundle import unpacked, weights
from ..bundle.packed import Entry
from ..bundle.weights import Planned, WeightFile
from ..host.runner import Runner
from ..surgery.bind_weights import point_at
from .job import Job
from .stages import Stages
from .under_way import UnderWay


def is_slim(job: Job) -> bool:
    """Whether the bundle leaves out what it holds in few bits; engines and their host read float32 weights."""
    return job.recipe.weights.packs and not job.recipe.weights.float32 and job.aim is None


def write(folder: Path, job: Job, stages: Stages) -> str:
    """Write the weight file and the graphs into `folder`; returns the sha256 of the weight file."""
    entries = {name: Entry.of(values) for name, values in stages.state("packed")["entries"].items()}
    graphs = [*stages.state("graphs")["graphs"]]
    file = WeightFile(stages.file("weights", weights.FILE))
    left_out = {name for entry in entries.values() for name in entry.weights} - _read(job, stages, graphs)
    kept = [
        Planned(n, t.dtype, t.shape, partial(_whole, file, n)) for n, t in file.tensors.items() if n not in left_out
    ]
    digest = weights.write(folder / weights.FILE, kept)
    places = {name: (weights.FILE, t) for name, t in weights.index(folder / weights.FILE).items()}
    places |= {name: (unpacked.FILE, t) for name, t in unpacked.places(entries).items() if name in left_out}
    for name in graphs:
        model = onnx.load(stages.file("graphs", f"{name}.onnx"), load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name in places:
                point_at(tensor, *places[tensor.name])
        onnx.save(model, folder / f"{name}.onnx")
    return digest


def _read(job: Job, stages: Stages, graphs: list[str]) -> set[str]:
    """Weights that sessions of these graphs read from the weight file, and the embedding where that is read there."""
    runner = Runner(UnderWay(job, stages), job.threads, backend="onnxruntime")
    assert isinstance(runner.backend, Backend) and runner.bundle.packed is not None  # as this recipe stores them
    read = set().union(*(runner.backend.reads(name) for name in graphs))
    return read if runner.bundle.packed.table_entry else read | {job.family.embedding}


def _whole(file: WeightFile, name: str) -> list[Any]:
    return [file[name]]
