"""What a model writes while it is measured: its dense answers to prompts, or to beginnings that are made up.

prompts -> requests -> dense greedy answers under the bundle's rule          random words -> drawn: greedy text from a
                                                                             random beginning runs in circles
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..base import by_name, json_lines
from ..base.errors import InputError
from ..evals.task import OWN_TASKS
from ..families import Pictures
from ..host.decode import Row, decode, sampled
from ..host.images import given, opened
from ..host.picture_notes import Note
from ..host.request import Request
from ..host.runner import Budget, Runner

OWN_WORDS = 8  # length of the random beginnings from which a model without prompts writes
Progress = Callable[..., None]
Texts = list[tuple[list[int], list[int]]]  # ids of prompts and answers


def _silent(what: str, done: int | None = None, total: int | None = None) -> None:
    """No progress."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the pictures it is about."""

    text: str
    images: tuple[Path | str, ...] = ()  # what `open` opens
    open: Callable[[Any], Any] = opened


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON Lines file: {"prompt": text, "image": path or list of paths, relative to the file}.

    Lines of `eval --data` are read as well, of which answers are left out. Raises InputError that names the line.
    """
    out = []
    for number, line in json_lines.numbered(path):
        try:
            entry = json.loads(line)
            if found := next((key for key in ("video", "videos") if entry.get(key)), None):
                raise ValueError(f"has {found!r}: clips are not read here, leave the line out")
            images = entry.get("image") or entry.get("images") or []
            images = [images] if isinstance(images, str) else images
            text = entry.get("prompt", entry.get("question"))
            if not isinstance(text, str) or not all(isinstance(i, str) for i in images):
                raise ValueError('needs "prompt": text, and may have "image": path')
            out.append(Prompt(text, tuple(path.parent / i for i in images)))
        except (ValueError, AttributeError) as e:
            raise InputError(f"line {number}: {e}", where=path, fix='write {"prompt": "..."} on every line') from e
    if not out:
        raise InputError("holds no prompt", where=path, fix='write {"prompt": "..."} on every line')
    return out


def asking(
    runner: Runner, prompts: list[Prompt], progress: Progress = _silent, notes: dict[str, list[Note]] | None = None
) -> Iterator[Request]:
    """The prompts as requests; what is to be said of a picture goes into `notes`, by its name."""
    seen: dict[tuple[Any, ...], Pictures] = {}
    for i, prompt in enumerate(prompts):
        progress("let the model answer", i, len(prompts))
        if prompt.images not in seen:
            pictures = [given(prompt.open(p), str(p)) for p in prompt.images]
            seen = {prompt.images: runner.see(pictures)}
            if notes is not None:
                notes |= {str(p): runner.notes_on(shown) for p, shown in zip(prompt.images, pictures, strict=True)}
        yield runner.ask(prompt.text, seen[prompt.images])


def own_text(runner: Runner, count: int, seed: int = 0, progress: Progress = _silent) -> Iterator[Request]:
    """`count` beginnings of random words."""
    rng, shape = np.random.default_rng(seed), runner.bundle.shape
    words = np.setdiff1d(np.arange(shape.vocab), [*shape.seen_tokens, *shape.stop_ids])
    for i in range(count):
        progress("let the model write", i, count)
        yield runner.request(rng.choice(words, OWN_WORDS), Pictures())


def answering(
    runner: Runner, asked: Iterable[Request], limit: int, drawn: bool, seed: int = 0, texts: Texts | None = None
) -> Iterator[tuple[Request, np.ndarray]]:
    """Requests with the dense model's answers [T] int64, at most `limit` tokens: `drawn`, or under the bundle's rule.

    `texts` gets the ids of each prompt and of its answer, with the stop id that ended it; of drawn answers none.
    """
    rng, shape = np.random.default_rng([seed, 1]), runner.bundle.shape
    for request in asked:
        prefilled = runner.prefill(request, Budget(dense=True))
        if drawn:
            row = prefilled.row(limit=limit)
            row.choose = sampled(rng, frozenset(shape.stop_ids))
        else:
            row = runner.answering(prefilled, runner.rule(), limit)
        answer = _written(runner, row)
        if texts is not None and not drawn:
            last = int(row.last.argmax())
            texts.append((request.ids.tolist(), answer.tolist() + [last] * (last in shape.stop_ids)))
        yield request, answer


def _written(runner: Runner, row: Row) -> np.ndarray:
    """[T] int64: the answer of a row."""
    return np.array([token for _, token in decode(runner.backend, [row])], np.int64)


def task_prompts(task: ModuleType, count: int, seed: int) -> list[Prompt]:
    """Calibration prompts of an eval task, from its training half. Raises InputError if it has none."""
    if not hasattr(task, "calibration_prompts"):
        name = task.__name__.rpartition(".")[2]
        raise InputError(f"the task {name} has no training questions", where="--data", fix="give a .jsonl file")
    return [Prompt(text, (image,), task.open_picture) for text, image in task.calibration_prompts(count, seed)]


def prompts_of(data: str | None, model: str, count: int, seed: int) -> tuple[list[Prompt], str]:
    """The prompts that `data` names and how to call them: a .jsonl file, an eval task, or None (the model's default).

    The demo models are asked their own task; any other model writes from random beginnings.
    """
    if data is None:
        data = OWN_TASKS.get(model, "own text")
    if data == "own text":
        return [], data
    name = data.replace("-", "_")
    if name in by_name.names_in("cm_export.evals.tasks"):
        return task_prompts(by_name.load("cm_export.evals.tasks", name, "task"), count, seed), f"{data}, training half"
    path = Path(data)
    if not path.is_file():
        known = [n.replace("_", "-") for n in by_name.names_in("cm_export.evals.tasks")]
        raise InputError(
            "no such file or task", where=f"--data {data}", fix=by_name.nearest(data, ["own text", *known])
        )
    return read_prompts(path)[:count], path.name
