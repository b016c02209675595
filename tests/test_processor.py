"""What surrounds the weights is judged before any work: wrong files are refused by name, surprising ones are noted."""

import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cm_export import families
from cm_export.base.errors import InputError
from cm_export.host.chat import Chat
from cm_export.recipe.aliases import DEMO
from cm_export.source import model, processor, processor_files

IM_END = 2


@pytest.fixture
def demo(tmp_path) -> Path:
    """The demo checkpoint without its weights."""
    shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def _notes(folder: Path) -> tuple[str, ...]:
    family, config = families.find("qwen2_vl"), model.read_config(folder)
    raw = json.loads((folder / "config.json").read_text())
    work = folder.parent / f"work-{len(list(folder.parent.iterdir()))}"
    work.mkdir()
    return processor.check(folder, raw, family.shape(config), family.tower(config), work)


def _set(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _drop(file: Path, key: str) -> None:
    values = json.loads(file.read_text())
    values.pop(key, None)
    file.write_text(json.dumps(values))


def test_the_demo_checkpoint_has_nothing_to_note(demo):
    assert _notes(demo) == ()


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _two_configs(folder: Path) -> None:
    _drop(folder / "generation_config.json", "eos_token_id")


NOTED = {
    "no tokenizer": (_without("tokenizer.json"), "no tokenizer.json", "answers no text"),
    "no template": (_without("chat_template.jinja"), "no chat template", "pictures", "chat_template.jinja"),
    "no picture rules": (
        _without("preprocessor_config.json"),
        "no preprocessor_config.json",
        "rules of the model type",
    ),
    "no stop id": (_two_configs, "no eos_token_id in generation_config.json", "2 in config.json does not count"),
    "a stop id that the template does not write": (
        lambda f: _set(f / "generation_config.json", eos_token_id=[7, 9]),
        "none of the stop ids (7, 9)",
    ),
    "a template that ends with another token": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja").read_text().replace("<|im_end|>\n{% endif %}", "<|endoftext|>\n{% endif %}")
        ),
        "none of the stop ids (2)",
    ),
    "a template that fails": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('a system message is needed') }}"),
        "the chat template fails (a system message is needed) on a plain question",
    ),
    "a template that divides by zero": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"),
        "the chat template fails (division by zero)",
    ),
    "templates without a name": (
        lambda f: ((f / "chat_template.jinja").unlink(), _set(f / "tokenizer_config.json", chat_template=["x"])),
        "no chat template",
    ),
    "sentencepiece only": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        "no tokenizer.json here but tokenizer.model",
        "save_pretrained",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_may_surprise_is_noted_at_the_start(demo, name):
    change, *words = NOTED[name]
    change(demo)
    found = _notes(demo)
    assert len(found) == 1 and all(word in found[0] for word in words), found


REFUSED = {
    "stop id outside": (lambda f: _set(f / "generation_config.json", eos_token_id=999999), "999999", "no token"),
    "one of several outside": (lambda f: _set(f / "generation_config.json", eos_token_id=[2, -1]), "-1", "no token"),
    "stop id of text": (lambda f: _set(f / "generation_config.json", eos_token_id="<|im_end|>"), "'<|im_end|>'"),
    "stop id true": (lambda f: _set(f / "generation_config.json", eos_token_id=True), "True"),
    "stop id 2.0": (lambda f: _set(f / "generation_config.json", eos_token_id=2.0), "2.0"),
    "stop ids in a list in a list": (lambda f: _set(f / "generation_config.json", eos_token_id=[[2]]), "[2]"),
    "stop id of config.json": (lambda f: _set(f / "config.json", eos_token_id=151645), "config.json", "151645"),
    "image token without a name": (lambda f: _set(f / "config.json", image_token_id=95), "image_token_id", "95"),
    "picture rules in the tokenizer's file": (
        lambda f: _set(f / "tokenizer_config.json", max_pixels=64),
        "tokenizer_config.json",
        "max_pixels",
    ),
    "rules in the processor's file": (
        lambda f: (f / "processor_config.json").write_text('{"image_processor": {"size": 448}}'),
        "processor_config.json: image_processor",
        "size = 448",
    ),
    "a template in tokenizer_config.json": (
        lambda f: ((f / "chat_template.jinja").unlink(), _set(f / "tokenizer_config.json", chat_template="{% if %}")),
        "template",
    ),
    "a special token that is a number": (
        lambda f: _set(f / "tokenizer_config.json", bos_token=3),
        "bos_token = 3 in tokenizer_config.json",
    ),
    "vocab.json alone": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "vocab.json").write_text('{"a": 0}')),
        "vocab.json",
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_run_could_not_use_is_refused_at_the_start(demo, name):
    change, *words = REFUSED[name]
    change(demo)
    with pytest.raises(InputError) as caught:
        _notes(demo)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "work-" not in str(caught.value)


def test_a_vocabulary_without_end_takes_no_memory(demo):
    """The weights, which are compared with it, say that it is wrong; their headers are read later."""
    config = json.loads((demo / "config.json").read_text())
    _set(demo / "config.json", text_config=config["text_config"] | {"vocab_size": 10**6})
    tracemalloc.start()
    assert _notes(demo) == ()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 10**7, "a set of so many ids would take 60 bytes each"


def test_a_template_inside_the_processors_own_file_goes_before_the_others(demo, tmp_path):
    (demo / "processor_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    processor_files.copy(demo, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 1 }}"


def test_a_build_says_at_the_start_and_in_its_manifest_what_may_surprise(bare_bundle):
    notes = json.loads((bare_bundle / "manifest.json").read_text())["notes"]
    assert ["no preprocessor_config.json" in notes[0], "no tokenizer.json" in notes[1]] == [True, True]


TRAINED = """{% for m in messages %}
<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}
  {% generation %}
{{ m['content'] }}<|im_end|>
  {% endgeneration %}
{% else %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m['content'] }}<|im_end|>
{% endif %}
{% endfor %}"""


def test_a_template_that_marks_answers_for_training_renders_as_in_transformers(tmp_path):
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(TRAINED)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    turns = [{"role": "user", "content": "what shape ?"}, {"role": "assistant", "content": "a circle ."}]
    expected = tokenizer.apply_chat_template(turns, chat_template=TRAINED, return_dict=False)
    shape = SimpleNamespace(sees=False, stop_ids=(IM_END,), vocab=94)
    files = {file.name: file for file in tmp_path.iterdir()}
    chat = Chat(SimpleNamespace(path=tmp_path, shape=shape, processor=files.get))
    assert chat.encode_turns(["what shape ?"], ["a circle ."], None, []).tolist() == expected
