"""The files of a checkpoint that a bundle takes along: tokenizer, chat template, picture rules, generation settings."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..base.errors import InputError
from ..base.json_file import read_object
from .quiet import in_short, quiet

FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
CLIP_RULES = "video_preprocessor_config.json"
RULES = "preprocessor_config.json"
NESTED = "processor_config.json"  # newer transformers keep picture rules and the chat template in it


def picture_rules(path: Path) -> tuple[dict[str, Any] | None, str]:
    """(rules, the file that they stand in); None without any. transformers prefers those inside the processor's own file."""
    nested = read_object(path / NESTED).get("image_processor") if (path / NESTED).is_file() else None
    if nested is not None:
        if not isinstance(nested, dict):
            raise InputError("image_processor is not a JSON object", where=path / NESTED, fix="correct it in the file")
        return nested, f"{path / NESTED}: image_processor"
    if (path / RULES).is_file():
        return read_object(path / RULES), str(path / RULES)
    return None, str(path / RULES)


def copy(path: Path, folder: Path) -> None:
    """Tokenizer (always as tokenizer.json), chat template and picture rules of a checkpoint, those that it has."""
    folder.mkdir()
    for name in FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)
    if (path / NESTED).is_file():
        rules, _ = picture_rules(path)
        if rules is not None:
            (folder / RULES).write_text(json.dumps(rules, indent=1, sort_keys=True))
        if isinstance(clips := read_object(path / NESTED).get("video_processor"), dict):
            (folder / CLIP_RULES).write_text(json.dumps(clips, indent=1, sort_keys=True))
        if isinstance(template := read_object(path / NESTED).get("chat_template"), str):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if (path / "tokenizer.json").is_file():
        shutil.copyfile(path / "tokenizer.json", folder / "tokenizer.json")
    elif (path / "vocab.json").is_file():
        _convert_tokenizer(path, folder / "tokenizer.json")


def _convert_tokenizer(path: Path, file: Path) -> None:
    with quiet():
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer.save(str(file))
        except Exception as e:  # whatever a tokenizer's reader raises
            fix = "save the tokenizer as tokenizer.json with transformers (save_pretrained)"
            raise InputError(f"makes no tokenizer ({in_short(e)})", where=path / "vocab.json", fix=fix) from e
