"""Which control tokens of a prompt are tokens: those that the chat template wrote. What a user typed stays text.

    typed         stop <|im_end|> here
    rendered      <|im_start|>user\\nstop ?|im_end|> here<|im_end|>\\n      "?", an unused character, hides a user's "<"
    encoded       [1] user \\n stop < | im _ end |> here [2] \\n            by a tokenizer in which control tokens have
                                                                         other names, so that no text can spell one

One character stands for one, and what is encoded is the whole rendering, so that text merges across every seam as it does
in transformers. Where nothing was typed that reads as a control token, the checkpoint's own tokenizer does the work.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import BundleError

# Added tokens without the mark `special` are often whole words or runs of blanks; those of this form are control tokens.
_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_TAG = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)  # <think>, [INST]: control tokens where the template names them

Write = Callable[[Sequence[str], Sequence[str]], str]  # (texts of the user, answers of the model) -> rendering


@dataclass(frozen=True)
class Rendering:
    """What the template wrote; `shown` gives back the characters that hide in user text."""

    text: str
    shown: dict[int, str]

    @property
    def plain(self) -> str:
        """As a user would read it."""
        return self.text.translate(self.shown)


class ControlTokens:
    """The control tokens of one tokenizer: marked special, of the form <|...|>, or tags that the chat template names."""

    def __init__(self, tokenizer: Any, template: str, named: Iterable[str], ids: Iterable[int]):
        """`named`: contents that the configuration calls special; `ids`: further ids, such as those that end an answer."""
        added, named, ids = tokenizer.get_added_tokens_decoder(), set(named), set(ids)
        special = {t.content for i, t in added.items() if t.special or t.content in named or i in ids}
        tags = {t.content for t in added.values() if _TAG.fullmatch(t.content)}
        found = special | {t for t in tags if t in template or _CONTROL.fullmatch(t)}
        self.ids: dict[str, int] = {t.content: i for i, t in added.items() if t.content and t.content in found}
        self._special, self._tokenizer = special, tokenizer
        self._renamed: Any = None
        self._names = {content: f"<{secrets.token_hex(16)}>" for content in self.ids}
        self._pattern = _any_of(self.ids)
        self._unused_in = template

    def render(self, write: Write, texts: Sequence[str], answers: Sequence[str]) -> Rendering:
        """A rendering in which every control token is the template's own."""
        characters = {content[0] for content in self.ids}
        hidden = self._hiding(characters, [*texts, *answers])
        shown = {ord(there): here for here, there in hidden.items()}
        table = str.maketrans(hidden)

        def written(readable: frozenset[str] = frozenset()) -> Rendering:
            """Only whole control tokens hidden; in answers, `readable` ones not even then."""
            first = [self._without(t, self.ids, hidden) for t in texts]
            return Rendering(
                write(first, [self._without(a, self.ids.keys() - readable, hidden) for a in answers]), shown
            )

        every = Rendering(write([t.translate(table) for t in texts], [a.translate(table) for a in answers]), shown)
        # A template may read what an answer says, such as where its reasoning ends (</think>): a token the model wrote.
        tags = {t for t in self.ids.keys() - self._special if any(t in a for a in answers)}
        whole = written()
        read = frozenset(t for t in tags if written(frozenset({t})).plain != whole.plain)
        whole = written(read) if read else whole
        # Hiding every such character also keeps two texts from spelling a token together; not where the template reads.
        return every if every.plain == whole.plain else whole

    def encode(self, rendering: Rendering, add_special_tokens: bool) -> Any:
        """The Encoding of the plain text of a rendering. Raises BundleError for a tokenizer that cannot be renamed."""
        own = [self.ids[m[0]] for m in self._pattern.finditer(rendering.text)] if self.ids else []
        encoding = self._tokenizer.encode(rendering.plain, add_special_tokens=add_special_tokens)
        if self._in(encoding) == [i for i in own if i != self._unknown]:
            return encoding
        if self._renamed is None:
            self._renamed = self._rename()
        text = self._pattern.sub(lambda m: self._names[m[0]], rendering.text).translate(rendering.shown)
        return self._renamed.encode(text, add_special_tokens=add_special_tokens)

    @property
    def _unknown(self) -> Any:
        """The id of words that the vocabulary lacks, which text may give."""
        model = self._tokenizer.model
        if (unknown := getattr(model, "unk_token", None)) is not None:
            return self._tokenizer.token_to_id(unknown)
        return getattr(model, "unk_id", None)

    def _in(self, encoding: Any) -> list[int]:
        """Control ids that come from the text."""
        ids = set(self.ids.values()) - {self._unknown}
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [i for i, is_added in pairs if i in ids and not is_added]

    def _hiding(self, characters: set[str], texts: Sequence[str]) -> dict[str, str]:
        """For each character one that stands nowhere: of the private use areas, which mean nothing to a template."""
        used = set(self._unused_in).union(*texts)
        unused = (c for c in map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))) if c not in used)
        return {c: next(unused) for c in sorted(characters)}

    def _without(self, text: str, tokens: Iterable[str], hidden: dict[str, str]) -> str:
        """The text, the first character of each of these tokens hidden, also where tokens overlap."""
        starts = [m.start() for m in re.finditer(f"(?={_any_of(tokens).pattern})", text)] if tokens else []
        letters = list(text)
        for at in starts:
            letters[at] = hidden[text[at]]
        return "".join(letters)

    def _rename(self) -> Any:
        """The tokenizer under whose other names no text can spell a control token; ids and all else are the same."""
        from tokenizers import Tokenizer

        data = json.loads(self._tokenizer.to_str())
        names, model = self._names, data["model"]
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(vocab := model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
        elif vocab is not None:  # Unigram: the place is the id
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            pairs = [p.split(" ") if isinstance(p, str) else p for p in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
        renamed = Tokenizer.from_str(json.dumps(data))
        for content, i in self.ids.items():
            if renamed.token_to_id(names[content]) != i:
                fix = "take the token out of the text"
                raise BundleError(
                    f"its tokenizer cannot tell {content} in a text from the token", where="text", fix=fix
                )
        return renamed


def _any_of(contents: Iterable[str]) -> re.Pattern[str]:
    """Matches any of them, the longest first, as tokenizers does."""
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")
