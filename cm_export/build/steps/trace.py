"""Stage `trace`: configuration -> one ONNX graph for each wrapper, in processes beside the loading of the weights."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base import environment
from ...source import model
from ..stage import Stage
from ..workers import Work, workers

if TYPE_CHECKING:
    from ..job import Job
    from ..stages import Stages


def _inputs(job: "Job") -> dict[str, Any]:
    # A head that differs from the embedding is an input of its own, whatever the configuration says.
    return {"config": job.config, "head_differs": model.head_differs(job.source.path)}


@contextlib.contextmanager
def _begin(job: "Job", folder: Path) -> Iterator[dict[Path, Work]]:
    """Tracing needs no weights: it starts at once and leaves its graphs in `folder`."""
    # A process takes as long to begin as a small graph takes to be traced, so each needs a processor of its own, and a
    # build that has but one traces by itself.
    processors = environment.processors()
    with workers(min(2, processors) if processors > 1 else 0, folder) as submit:
        targets = {name: folder / f"{name}.onnx" for name in job.shape.traced}
        yield {file: submit(model.trace_graph, job.source.path, name, file) for name, file in targets.items()}


def _run(folder: Path, job: "Job", stages: "Stages", begun: dict[Path, Work]) -> None:
    for i, (file, future) in enumerate(begun.items()):
        job.progress("trace the graphs", i, len(begun))
        future.result()
        file.rename(folder / file.name)


# torch's exporter needs onnxscript, which nothing here imports.
STAGE = Stage("trace", (), _inputs, _run, begin=_begin, libraries=("onnxscript",))
