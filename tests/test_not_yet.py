"""Model types that the graphs cannot hold are refused by name, with the reason, before anything is read but config.json."""

import json
import re
from pathlib import Path

import pytest

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.source.checkpoint import resolve
from cm_export.source.not_yet import REASONS, why_not

DOCS = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("gemma3", "sliding windows"),
        ("mistral", "sliding windows"),
        ("qwen3_next", "recurrent state"),
        ("lfm2", "recurrent state"),
        ("mixtral", "mixture of experts"),
        ("qwen3_vl_moe", "mixture of experts"),
        ("deepseek_v3", "mixture of experts"),
        ("florence2", "encoder and a decoder"),
        ("mllama", "cross-attention"),
        ("phi3", "gate_up_proj"),
        ("gpt2", "without a gate"),
    ],
)
def test_a_model_type_that_cannot_be_held_is_refused_with_the_reason_and_a_pointer(tmp_path, model_type, word):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(InputError) as caught:
        resolve(str(tmp_path))
    for part in (repr(model_type), word, "supported: ", "docs/families.md"):
        assert part in str(caught.value)


def test_a_type_that_nobody_knows_is_called_unsupported_without_a_reason():
    assert why_not("my_own_model") is None and why_not(None) is None and why_not(["x"]) is None


def test_no_type_stands_in_two_lists_and_none_is_a_family():
    types = [name for reason in REASONS for name in reason.types]
    assert len(types) == len({*types}) and not {*types} & {*families.names()}


def test_the_page_has_a_row_for_every_reason_and_every_type_on_it_is_refused_for_it():
    page = DOCS.read_text(encoding="utf-8")
    for reason in REASONS:
        row = next(
            line for line in page.splitlines() if line.startswith(f"| {reason.what.removesuffix(' to the picture')} |")
        )
        shown = re.findall(r"`([\w-]+)`", row.split("|")[2])
        assert shown and {*shown} <= {*reason.types, "gate_up_proj"}
