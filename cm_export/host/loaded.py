"""A bundle that was loaded to answer questions: what `cm-export run` and the Python API (docs/python.md) hold.

with cm_export.load("engine.plan") as model: print(model.generate("What is this?", "scene.png").text)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..base.errors import InputError
from ..bundle.bundle import Bundle
from . import asking, together
from .asking import Asked, Messages
from .conversation import Answer, Conversation, Stream, whole
from .images import check_size
from .runner import Runner, check_converses
from .sampling import Sampling

AT_ONCE = 8  # requests of a batch that decode together


class LoadedBundle(Runner):
    """A bundle with its sessions, and answers in text. Any number of threads may ask it at the same time."""

    def conversation(
        self,
        images: Any = (),
        system: str | None = None,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> Conversation:
        """Questions about the same pictures, one after the other (see conversation.py); arguments as of `generate`."""
        self.check_open()
        how = system, dense, neuron_share, token_share, seed, control_tokens, sampling
        asked = asking.before_questions(images, *how)
        check_converses(self.recipe, dense)
        self.check_has("decode_dense" if dense else "turn", "a second question")
        return self.talk(asked)

    def generate(
        self,
        prompt: str | Messages,
        images: Any = (),
        system: str | None = None,
        max_new_tokens: int = 128,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        guard: int | bool | None = None,
        on_text: Callable[[str], None] | None = None,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer one question about pictures; `on_text` gets the text as it comes.

        `prompt`: a text, or messages of which the last is answered. `images`: none, one or several, each a path, the bytes
        of a picture file, a PIL image or a numpy array uint8 [H,W,3]. Shares replace the recipe's. `guard`: check drafts
        of that many tokens (True: 16) against the dense model (see guard.py). `control_tokens`: those in a text are
        tokens; unasked they are text, as everything that a user types. `sampling`: how tokens are chosen (see
        sampling.py); None: greedily, as the checkpoint says. Nothing is shown before the weights match their hash. Raises
        InputError, BundleError.
        """
        how = images, system, max_new_tokens, dense, neuron_share, token_share, seed, guard, control_tokens, sampling
        return whole(self.stream(prompt, *how), on_text)

    def stream(
        self,
        prompt: str | Messages,
        images: Any = (),
        system: str | None = None,
        max_new_tokens: int = 128,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        guard: int | bool | None = None,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> Stream:
        """The same as an iterator of pieces of text. What is wrong with the arguments is raised here, at once."""
        self.check_open()
        how = images, system, max_new_tokens, dense, neuron_share, token_share, seed, guard, control_tokens, sampling
        asked = asking.asked(prompt, *how)
        return self.talk(asked).written(asked.prompts[-1], asked.limits)

    def batch(self, requests: Iterable[str | Messages | Mapping[str, Any]], at_once: int = AT_ONCE) -> list[Answer]:
        """Answer several requests, at most `at_once` of them together; each gets what `generate` gives it alone.

        A request is a prompt, or a mapping with arguments of `generate`. Raises InputError that names the request.
        """
        self.check_open()
        found, at_once = asking.several(requests), asking.whole_number(at_once, "at_once", 1)
        for i, asked in enumerate(found):
            try:
                self._check_sizes(asked)
            except InputError as e:
                raise asking.of_request(i, e) from e
        return together.answered(self, found, at_once)

    def close(self) -> None:
        """Free the sessions. Whatever is asked afterwards, also the next piece of a stream, ends in an InputError."""
        if not self.is_closed:
            self.is_closed = True
            backend, self.backend = self.backend, _Closed(self)
            backend.drop(*self.bundle.manifest["graphs"])

    def __enter__(self) -> LoadedBundle:
        self.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        fix = "load it in the process that asks"
        raise InputError("a loaded bundle cannot be copied or sent to another process", where=self.bundle.path, fix=fix)

    def talk(self, asked: Asked) -> Conversation:
        """The conversation of a request that was checked (see asking.py). Raises InputError for sizes of pictures."""
        self._check_sizes(asked)
        return Conversation(self, asked)

    def _check_sizes(self, asked: Asked) -> None:
        for picture in asked.images:
            check_size(picture.image, self.tower.min_side, self.tower.max_ratio, where=picture.name)


class _Closed:
    """In the place of the backend of a bundle that was closed."""

    def __init__(self, runner: Runner):
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        self._runner.check_open()


def load(
    path: str | os.PathLike[str],
    threads: int = 0,
    progress: Callable[..., None] = lambda what, *_: None,
    backend: str | None = None,
    device: str | None = None,
) -> LoadedBundle:
    """Open a bundle for running. Raises InputError, BundleError.

    `threads`: of the CPU, 0 takes all cores. `backend`: None takes the one that it was built for. `device`: cpu, cuda,
    cuda:1 or auto; None takes what the backend is for.
    """
    for what, value, such in (("backend", backend, "onnxruntime"), ("device", device, "cuda")):
        if value is not None and not isinstance(value, str):
            raise InputError(f"is a {type(value).__name__}", where=what, fix=f'give a name, such as "{such}"')
    threads = asking.whole_number(threads, "threads", 0)
    progress("open the bundle")
    return LoadedBundle(opened(path), threads, backend=backend, device=device)


def opened(path: str | os.PathLike[str]) -> Bundle:
    """The bundle in that directory, without what runs it. Raises InputError, BundleError."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a bundle is a directory, not a {type(path).__name__}", where="load", fix="give its path")
    try:
        return Bundle(Path(path))
    except OSError as e:
        raise InputError(f"cannot be opened ({e.strerror})", where=path, fix="give a directory that can be read") from e
