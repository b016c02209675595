"""A bundle that was loaded to answer questions: what `cm-export run` and the Python API hold.

with load("engine.plan") as model: print(model.generate("What is this?", [picture]).text)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle
from .conversation import Answer, Conversation
from .runner import Budget, Runner, check_converses
from .sampling import Sampling


class LoadedBundle(Runner):
    """A bundle with its sessions, and answers in text."""

    def conversation(
        self,
        images: Sequence[Any] = (),
        system: str | None = None,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> Conversation:
        """Questions about the same pictures, one after the other (see conversation.py). Raises InputError.

        `control_tokens`: those in a text are tokens; unasked they are text, as everything that a user types.
        """
        check_converses(self.recipe, dense)
        self.check_reads_several("a second question")
        budget = Budget(dense, neuron_share, token_share, seed)
        return Conversation(self, images, system, budget, control_tokens, sampling)

    def generate(
        self,
        prompt: str,
        images: Sequence[Any] = (),
        system: str | None = None,
        max_new_tokens: int = 128,
        dense: bool = False,
        neuron_share: float | None = None,
        token_share: float | None = None,
        seed: int | None = None,
        guard: int | None = None,
        on_text: Callable[[str], None] | None = None,
        control_tokens: bool = False,
        sampling: Sampling | None = None,
    ) -> Answer:
        """Answer one question about pictures (PIL, of any mode, or paths); `on_text` gets the text as it comes.

        `sampling`: how tokens are chosen (see sampling.py); None: greedily, as the checkpoint says. `guard`: check drafts
        of that many tokens against the dense model (see guard.py). `control_tokens`: as of `conversation`. Nothing is
        shown before the weights match their hash. Raises InputError, BundleError.
        """
        budget = Budget(dense, neuron_share, token_share, seed)
        conversation = Conversation(self, images, system, budget, control_tokens, sampling)
        return conversation.ask(prompt, max_new_tokens, guard, on_text)


def load(
    path: str | Path,
    threads: int = 0,
    progress: Callable[..., None] = lambda what, *_: None,
    backend: str | None = None,
) -> LoadedBundle:
    """Open a bundle for running; `backend` None: the one that it was built for. Raises InputError, BundleError."""
    progress("open the bundle")
    return LoadedBundle(Bundle(path), threads, backend=backend)
