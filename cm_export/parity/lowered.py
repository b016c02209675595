"""The proof that the graphs lowered for every version of TensorRT say what the portable ones say (build/gates_lowered.py)."""

import tempfile
from pathlib import Path

from ..backends.tensorrt.export import Source, write_graphs
from ..backends.tensorrt.targets import TARGETS
from ..base import disk
from ..build import gates_lowered
from ..source.probe import probe
from .answers import recipe_of
from .proof import Found
from .subject import Subject, copied

ROOM = 16  # tokens of a cache beyond the prompt
LEAST = 48, 96  # that an engine's prompt and cache hold


def lowered(of: Subject) -> Found:
    """The gate that is nearest to its limit, of all graphs and versions."""
    asked = probe(of.shape, of.tower, of.config)
    prompt = max(LEAST[0], len(asked.ids))
    recipe = recipe_of(of).replace(engine__max_prompt=prompt, engine__capacity=max(LEAST[1], prompt + ROOM))
    graphs = of.graphs(recipe)
    worst, count = Found(0.0, 1.0, ""), 0
    for target in TARGETS:
        with tempfile.TemporaryDirectory(prefix=disk.TEMPORARY) as folder:
            source = Source(lambda n: copied(graphs[n]), tuple(graphs), of.weights, of.shape, recipe, of.tower)
            write_graphs(source, Path(folder), target)
            for gate in gates_lowered.run_gates(source, target, of.family, of.tower, asked, Path(folder), threads=1):
                count += gate.limit is not None
                if gate.limit and gate.value / gate.limit >= worst.value / worst.limit:
                    worst = Found(gate.value, gate.limit, f"{gate.name}, TensorRT {target.name}")
    return Found(
        worst.value, worst.limit, f"{count} gates of {len(TARGETS)} versions; nearest to its limit: {worst.detail}"
    )
