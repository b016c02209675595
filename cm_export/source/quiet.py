"""What every call into transformers needs around it: silence, and its exceptions in one line."""

import contextlib
import os
from collections.abc import Iterator


def in_short(e: Exception) -> str:
    """An exception of another library, for an error of ours."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers prints progress bars and advice that do not concern our users."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
