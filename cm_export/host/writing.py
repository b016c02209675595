"""The text of an answer while its tokens come: whole characters only, nothing of a stop string, a few tokens a step.

tokens   a  b  c  d          text of [b c d] minus text of [b]  =  what c d add       b: context, c d: not whole before
text     "x"  "y<"  "/e"  "nd>"      stop "</end>":  x, y are handed out; "<", "</e" are held; "</end>" ends it

Decoding the whole answer again for every token would cost the square of its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_PART = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
_LONGEST = 32  # tokens without a whole character at their end, after which bytes that are none are shown as such


class Writing:
    """What an answer says so far, and whether a stop string ended it."""

    def __init__(self, decode: Callable[[list[int]], str], shows: Callable[[int], bool], stop: Sequence[str] = ()):
        """decode: ids -> text; shows: whether a token has text of its own, which control tokens have not."""
        self.text = ""  # that may be shown
        self.stopped: str | None = None  # the stop string
        self._decode, self._shows, self._stop = decode, shows, tuple(stop)
        self._context: list[int] = []  # tokens whose text is out: a decoder may join the next one to it
        self._pending: list[int] = []  # tokens after them
        self._before = ""  # text of the context
        self._out = 0  # characters of the pending tokens that are out
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that may be shown since the last call."""
        if self.stopped is not None or not self._shows(token):
            return ""
        self._pending.append(token)
        return self._grow(last=len(self._pending) >= _LONGEST)

    def end(self) -> str:
        """The same after the last token: what was waiting for more, unless a stop string ended the answer."""
        out = "" if self.stopped is not None else self._grow(last=True)
        if self.stopped is None:
            self.text += self._held
            out, self._held = out + self._held, ""
        return out

    def _grow(self, last: bool) -> str:
        """Take over the characters of the pending tokens that are whole, or all of them."""
        if not self._pending:
            return ""
        text = self._decode(self._context + self._pending)
        whole = len(text if last else text.rstrip(_PART))
        start = len(self._before) + self._out
        new = text[start:whole]
        if whole == len(text):
            self._context, self._pending, self._out = self._pending, [], 0
            self._before = self._decode(self._context)
        else:
            self._out = max(self._out, whole - len(self._before))
        return self._release(new)

    def _release(self, new: str) -> str:
        """The text up to a stop string, or to what may become one."""
        text = self._held + new
        # The one that is complete first, however tokens part the text; of several that end together the longest.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            out, self._held = text[:at], ""
        else:
            begun = max((_begun(text, stop) for stop in self._stop), default=0)
            out, self._held = text[: len(text) - begun], text[len(text) - begun :]
        self.text += out
        return out


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
