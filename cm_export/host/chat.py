"""Text in, token ids out, and back: the chat template and the tokenizer of a bundle, without torch or transformers.

system, pictures, prompt -> chat template (sandboxed Jinja) -> what stands for each picture -> ids

Text is data: what reads as a control token in it is encoded as text (see control_tokens.py), unless it is asked otherwise.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import numpy as np

from ..base.errors import BundleError, InputError
from ..bundle.bundle import Bundle
from ..families import Layout
from .control_tokens import ControlTokens, Rendering
from .writing import Writing

_SETTINGS = "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARK = "qzx7"  # a word that no template writes of its own


class NotInTemplate(BundleError):
    """What was said has no place in the checkpoint's chat template; another question has."""


class Chat:
    """The tokenizer of one bundle. Raises BundleError if the checkpoint came without one."""

    def __init__(self, bundle: Bundle):
        from tokenizers import Tokenizer

        file = bundle.processor("tokenizer.json")
        if file is None:
            raise BundleError(
                "has no tokenizer, since its checkpoint had none",
                where=bundle.path,
                fix="add tokenizer.json there and build again",
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bundle, self._config = bundle, _json(bundle, _SETTINGS)
        source = _template(bundle, self._config)
        self._template = None if source is None else self._compile(source)
        self.image_token: str | None = None
        self.clip_token: str | None = None
        if bundle.shape.sees:
            self.image_token = self._tokenizer.id_to_token(bundle.shape.image_token)
            if bundle.shape.clip_token >= 0:
                self.clip_token = self._tokenizer.id_to_token(bundle.shape.clip_token)
        # As transformers: a generation_config.json that names none leaves none, whatever config.json says.
        of_config = bundle.processor("generation_config.json") is None
        stop = list(bundle.shape.stop_ids) if of_config else _json(bundle, "generation_config.json").get("eos_token_id")
        stop = [] if stop is None else stop
        self.stop_ids = frozenset(stop if isinstance(stop, list) else [stop])
        self._special = {k: _content(v) for k, v in self._config.items() if k.endswith("_token") and v}
        for name in _TOKENS:
            if not isinstance(self._special.get(name, ""), str):
                what = f"{name} = {self._special[name]!r} in {_SETTINGS} is no token"
                raise BundleError(what, where=bundle.path, fix="correct it in the file")
        named = [v for v in self._special.values() if isinstance(v, str)]
        ids = {*self.stop_ids, *(bundle.shape.seen_tokens if bundle.shape.sees else ())}
        self._control = ControlTokens(self._tokenizer, source or "", named, ids)

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says how questions are put; without, a prompt is continued."""
        return self._template is not None

    def encode(
        self, prompt: str, system: str | None, pictures: Sequence[Layout], control_tokens: bool = False
    ) -> np.ndarray:
        """Token ids [S] int64 of one user turn with its pictures before the question. Raises InputError.

        Without a chat template (base models have none) the prompt itself is continued.
        """
        return self.encode_turns([prompt], [], system, pictures, control_tokens)

    def encode_turns(
        self,
        prompts: list[str],
        answers: list[str],
        system: str | None,
        pictures: Sequence[Layout],
        control_tokens: bool = False,
    ) -> np.ndarray:
        """Token ids [S] int64 of a conversation; pictures stand before the first question. Raises InputError.

        With fewer answers than prompts it ends where the next answer begins, else after the last answer.
        `control_tokens`: those in the texts are tokens, too.
        """
        for text, where in (*((p, "--prompt") for p in prompts), (system or "", "--system")):
            for mark in (self.image_token, self.clip_token):
                if control_tokens and mark and mark in text:
                    raise InputError(f"contains the reserved {mark}", where=where, fix="leave it out")
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise InputError("is not valid text (UTF-8)", where=where) from e
        if self._template is None and (system or pictures or answers):
            raise NotInTemplate(
                "its checkpoint has no chat template, which places pictures, system messages and later questions",
                where=self._bundle.path,
                fix="leave them out, or add chat_template.jinja there and build again",
            )
        texts = [*([system] if system else []), *prompts]

        def write(texts: Sequence[str], answers: Sequence[str]) -> str:
            head, asked = (texts[0], texts[1:]) if system else (None, texts)
            return self._write(asked, answers, head, pictures)

        found = Rendering(write(texts, answers), {}) if control_tokens else self._control.render(write, texts, answers)
        filled = self._filled(found.text, pictures)
        encoding = self._control.encode(Rendering(filled, found.shown), self._adds_special_tokens(filled))
        return np.array(encoding.ids, np.int64)

    def _filled(self, text: str, pictures: Sequence[Layout]) -> str:
        """A rendering with what stands for each picture and clip in the place of its one token. Raises BundleError."""
        if not pictures:
            return text
        marks = [(self.clip_token if p.is_clip else self.image_token) or "" for p in pictures]
        found = re.findall("|".join(re.escape(mark) for mark in {*marks}), text) if all(marks) else []
        if found != marks:
            raise BundleError(
                f"the chat template places {len(found)} of {len(pictures)} pictures and clips", where=self._bundle.path
            )
        out, rest = "", text
        for picture, mark in zip(pictures, marks, strict=True):
            before, _, rest = rest.partition(mark)
            out += before + picture.written(mark)
        return out + rest

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer adds its special tokens, such as <s>, to a prompt. As transformers does.

        A template has written them; one of a model with pictures may leave them out, unless its text begins with <s>.
        """
        if self._template is None:
            return True
        begin = self._special.get("bos_token")
        return self._bundle.shape.sees and not (begin and text.startswith(begin))

    def _write(
        self, prompts: Sequence[str], answers: Sequence[str], system: str | None, pictures: Sequence[Layout]
    ) -> str:
        """What the template makes of a conversation."""
        if self._template is None:
            return prompts[0]
        messages = [{"role": "system", "content": self._system(system)}] if system else []
        for i, prompt in enumerate(prompts):
            messages.append({"role": "user", "content": self._blocks(prompt, () if i else pictures)})
            if i < len(answers):
                messages.append({"role": "assistant", "content": self._blocks(answers[i], ())})
        return self._render(self._template, messages, len(answers) < len(prompts))

    def _blocks(self, text: str, pictures: Sequence[Layout]) -> Any:
        """A message's content. Templates of models without pictures know it as text only."""
        blocks = [{"type": "video" if p.is_clip else "image"} for p in pictures] + [{"type": "text", "text": text}]
        return blocks if self._bundle.shape.sees else text

    def _system(self, text: str) -> Any:
        """A system message's content, in a form that the template writes. Raises BundleError where it writes none."""
        if not self._system_forms:
            self._render(self._template, self._with_system(text), True)  # if it fails, that is the reason
            fix = "leave it out, or put it into the question"
            raise BundleError("its chat template leaves a system message out", where=self._bundle.path, fix=fix)
        return self._system_forms[0](text)

    @cached_property
    def _system_forms(self) -> list[Callable[[str], Any]]:
        """What a system message may be: some templates read text only, some nothing but blocks and drop the text."""
        forms: list[Callable[[str], Any]] = [str, lambda text: self._blocks(text, ())]
        return [form for form in forms if self._shows_system(form(_MARK))]

    def _shows_system(self, content: Any) -> bool:
        """Whether the template writes a system message of this content, _MARK in it."""
        try:
            return _MARK in self._render(self._template, self._with_system(content), True)
        except BundleError:
            return False

    def _with_system(self, content: Any) -> list[dict[str, Any]]:
        return [{"role": "system", "content": content}, {"role": "user", "content": self._blocks("a", ())}]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the vocabulary lacks (only tokenizers with an unknown token have such)."""
        unknown = self._tokenizer.token_to_id(_content(self._config.get("unk_token")) or "")
        if unknown is None:
            return []
        encoding = self._control.encode(self._control.render(lambda texts, _: texts[0], [prompt], []), True)
        return [prompt[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == unknown]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def writing(self, stop: tuple[str, ...] = ()) -> Writing:
        """The text of one answer as its tokens come; a string of `stop` ends it."""
        return Writing(self.decode, self._shows, stop)

    def _shows(self, token: int) -> bool:
        """Whether `decode` writes anything for a token: not for control tokens, nor for ids that no token has."""
        return token not in self._silent and self._tokenizer.id_to_token(token) is not None

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)

    def stops(self, strings: tuple[str, ...] = ()) -> frozenset[int]:
        """Ids that end an answer: the checkpoint's, and control tokens among `strings`, which are in no text."""
        return self.stop_ids | {i for text in strings if (i := self._tokenizer.token_to_id(text)) in self._silent}

    def _compile(self, source: str) -> Any:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from .template_tags import TAGS

        def fail(message: str) -> NoReturn:
            raise TemplateError(message)

        # The same settings as transformers' apply_chat_template, so that templates mean what they mean there.
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=TAGS)
        env.globals |= {"raise_exception": fail, "strftime_now": lambda f: datetime.now().strftime(f)}
        try:
            return env.from_string(source)
        except TemplateError as e:
            raise BundleError(f"the chat template is not valid ({e})", where=self._bundle.path) from e

    def _render(self, template: Any, messages: list[dict[str, Any]], is_open: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(template.render(messages=messages, add_generation_prompt=is_open, **self._special))
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            raise NotInTemplate(f"the chat template fails ({e})", where=self._bundle.path) from e


def _template(bundle: Bundle, config: dict[str, Any]) -> str | None:
    if (file := bundle.processor("chat_template.jinja")) is not None:
        return file.read_text(encoding="utf-8")
    template = _json(bundle, "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # named templates
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    file = bundle.processor(name)
    return json.loads(file.read_bytes()) if file is not None else {}
