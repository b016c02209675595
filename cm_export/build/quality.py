"""The gate on answers: a build fails when its bundle answers the user's questions worse than required.

sparse accuracy                    >= --require-accuracy       right answers of all questions
sparse accuracy / dense accuracy   >= --require-retained       what pruning kept
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.errors import GateFailed, InputError
from ..base.metrics import check_floor
from ..evals.compare import Sweep, compare
from ..evals.task import Task, check_distinct
from ..host.backend import DEFAULT
from ..recipe.recipe import Recipe
from .gates import Gate


@dataclass(frozen=True)
class Requirement:
    """Questions, and the least accuracy and share of the dense accuracy to reach on them (None: not required)."""

    task: Task
    accuracy: float | None = None
    retained: float | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a share that cannot be required, no question, or one that is there twice."""
        check_floor(self.accuracy, "required accuracy")
        check_floor(self.retained, "required share of the dense accuracy")
        if not self.task.questions:
            raise InputError("no questions", where=f"task {self.task.name}", fix="give some")
        check_distinct(self.task.questions, f"task {self.task.name}")


def check(
    folder: Path, required: Requirement, recipe: Recipe, threads: int, progress: Callable[..., None]
) -> list[dict[str, Any]]:
    """The gates of an assembled bundle, as plain values. Raises GateFailed naming the figure that is too low."""
    sweep = Sweep(neuron_shares=(recipe.neurons.share,))
    report = compare(folder, required.task, sweep, None, threads, None, progress, DEFAULT)
    dense, sparse, random = report["dense"], report["sparse"], report["random"]
    low, high = sparse["ci"]
    detail = f"{report['task']}, n = {report['n']}: sparse {sparse['accuracy']:.4f} [{low:.3f}, {high:.3f}]"
    detail += f", dense {dense['accuracy']:.4f}"
    detail += f", random of the same size {random['accuracy']:.4f}" if random else ""
    gates = []
    for name, value, floor in (
        ("accuracy", sparse["accuracy"], required.accuracy),
        ("share of the dense accuracy", sparse["of_dense"], required.retained),
    ):
        if floor is None:
            continue
        if value is None:
            raise GateFailed(
                "the dense model answers nothing right", where=detail, fix="check the questions and answers"
            )
        if not value >= floor:  # also takes NaN
            raise GateFailed(
                f"{name} {value:.4f} is below the required {floor:g}",
                where=detail,
                fix="no bundle was written; raise --neuron-share or --token-share, or choose other policies",
            )
        gates.append(asdict(Gate(name, value, floor, True, detail)))
    return gates
