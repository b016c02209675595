"""What surrounds the weights of a checkpoint: tokenizer, chat template, picture rules, stop ids; judged before any work.

wrong       tokenizer.json that no library reads, size = {"min_pixels": ...}, eos_token_id = 999999   -> InputError
surprising  no tokenizer, no chat template, no picture rules, answers that may not end                -> a note
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import CmExportError, InputError
from ..base.json_file import read_object
from ..families import Config, Shape, Tower
from ..host.chat import Chat
from ..host.template_tags import TAGS
from .processor_files import FILES, NESTED, RULES, copy, picture_rules
from .quiet import in_short

# Keys of picture rules, which transformers' processors take from tokenizer_config.json as well, before their own.
_PICTURE_KEYS = (
    "size", "min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size", "do_resize", "do_rescale",
    "do_normalize", "image_mean", "image_std", "resample", "rescale_factor",
)  # fmt: skip


@dataclass(frozen=True)
class _Folder:
    """Processor files as `Chat` asks a bundle for them, before there is a bundle."""

    path: Path
    shape: Shape

    def processor(self, name: str) -> Path | None:
        file = self.path / name
        return file if file.is_file() else None


def check(path: Path, config: Config, shape: Shape, tower: Tower | None, work: Path) -> tuple[str, ...]:
    """What may surprise about these files, in sentences. Raises InputError for one that `run` could not use.

    `work`: an empty directory for the files as a bundle will hold them.
    """
    _check_readable(path)
    _check_stop_ids(path, config, shape)
    copy(path, work / "processor")
    found = [*_picture_notes(path, tower)]
    if not (work / "processor" / "tokenizer.json").is_file():
        fix = "; save the tokenizer with transformers (save_pretrained) to get one"
        other = " but tokenizer.model" + fix if (path / "tokenizer.model").is_file() else ""
        return (*found, f"no tokenizer.json here{other}: the bundle can be measured and benched, but answers no text")
    folder = _Folder(work / "processor", shape)
    try:
        chat = Chat(folder)  # type: ignore[arg-type]  # all that it asks of a bundle
    except CmExportError as e:
        raise InputError(e.what, where=path, fix="mend or remove it") from e
    if shape.sees and chat.image_token is None:
        what = f"has no token {shape.image_token}, the image_token_id of config.json"
        raise InputError(what, where=path / "tokenizer.json", fix="the two files belong to different models")
    return (*found, *_chat_notes(chat, shape))


def _chat_notes(chat: Chat, shape: Shape) -> Iterator[str]:
    """Whether questions can be put and answers end."""
    stop = chat.stop_ids
    if not chat.has_template:
        lost = "pictures, system messages and later questions are refused" if shape.sees else "prompts are continued"
        yield f"no chat template here: {lost}; add chat_template.jinja if the model was trained to answer"
    if not any(i in range(shape.vocab) for i in stop):
        other = [str(i) for i in shape.stop_ids if i in range(shape.vocab)]
        known = f" ({', '.join(other)} in config.json does not count beside that file)" if other else ""
        yield f"no eos_token_id in generation_config.json{known}: as in transformers, every answer goes to its limit"
    elif chat.has_template:
        yield from _template_notes(chat, stop)


def _template_notes(chat: Chat, stop: frozenset[int]) -> Iterator[str]:
    """Whether the template works, and ends an answer with a token at which generation stops."""
    try:
        chat.encode("a", None, [])
    except CmExportError as e:
        yield f"{e.what} on a plain question, so the bundle will answer none"
        return
    try:
        one, other = (chat.encode_turns(["a"], [answer], None, []) for answer in ("a", "b c"))
    except CmExportError:
        return  # a template for one question only
    shared = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), len(one))
    if not stop & {*map(int, one[len(one) - shared :])}:
        ids = ", ".join(map(str, sorted(stop)))
        yield f"the chat template ends an answer with none of the stop ids ({ids}), so answers may go on to their limit"


def _check_stop_ids(path: Path, config: Config, shape: Shape) -> None:
    """Raises InputError for a stop id that is no token, in either file that may state one."""
    file = path / "generation_config.json"
    given = [("generation_config.json", read_object(file) if file.is_file() else {}), ("config.json", config)]
    inner = config.get("text_config")
    given += [("config.json: text_config", inner)] if isinstance(inner, dict) else []
    for name, values in given:
        ids = values.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(token) is not int or token not in range(shape.vocab):
                what = f"eos_token_id {token!r} is no token: ids are whole numbers from 0 to {shape.vocab - 1}"
                raise InputError(what, where=path / name, fix="correct it, or the vocabulary is another model's")


def _picture_notes(path: Path, tower: Tower | None) -> Iterator[str]:
    """Raises InputError for rules that the tower does not follow."""
    if tower is None:
        return
    rules, where = picture_rules(path)
    try:
        tower.rule(rules or {})
    except InputError as e:
        raise InputError(e.what, where=where, fix=e.fix) from e
    if rules is None:
        yield f"no {RULES} here: pictures are cut by the rules of the model type, which may not be this checkpoint's"
    tokenizer = path / "tokenizer_config.json"
    held = read_object(tokenizer) if tokenizer.is_file() else {}
    if keys := [key for key in _PICTURE_KEYS if held.get(key) is not None]:
        fix = f"move it to {RULES}; transformers would prefer it to that file"
        raise InputError(f"holds {keys[0]}, a rule for pictures", where=tokenizer, fix=fix)


def _check_readable(path: Path) -> None:
    """Raises InputError for a tokenizer, template or rule file that `run` could not read; all of them may be absent."""
    from jinja2 import Environment
    from tokenizers import Tokenizer

    for name in (*(n for n in FILES if n.endswith(".json")), NESTED):
        if (path / name).is_file():
            read_object(path / name)
    readers: dict[str, Callable[[str], Any]] = {
        "tokenizer.json": Tokenizer.from_str,
        "chat_template.jinja": Environment(extensions=TAGS).parse,
    }
    for name, read in readers.items():
        try:
            if (path / name).is_file():
                read((path / name).read_text(encoding="utf-8"))
        except Exception as e:  # two libraries, each with its own
            fix = "download it again, or remove it: a bundle without it still benches"
            raise InputError(f"cannot be read ({in_short(e)})", where=path / name, fix=fix) from e
