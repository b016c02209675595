"""Checkpoints as people have them: half precision, re-saved, a head that is not the embedding, newer processor files."""

import json

import numpy as np
import pytest
import torch
from conftest import wide
from random_models import Exported, family, random_checkpoint, random_config
from safetensors.torch import load_file, save_file
from stepping import core_sets, gatherer
from tolerances import agrees

from cm_export.backends.onnxruntime.backend import Backend
from cm_export.base.errors import InputError
from cm_export.bundle import weights
from cm_export.families.qwen2_vl import image_rule
from cm_export.source import model as hf
from cm_export.source import processor_files, trace
from cm_export.source.probe import probe, reference
from cm_export.surgery import pipeline


def silent(*_, **__):
    pass


@pytest.fixture
def half(tmp_path):
    """A checkpoint saved by transformers in bfloat16: config.json says so at every level."""
    from transformers import Qwen2VLForConditionalGeneration

    config = random_config(3)
    path = random_checkpoint(config, tmp_path / "full")
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    (tmp_path / "out").mkdir()
    return Exported(tmp_path / "half", tmp_path / "out")


@pytest.mark.parametrize("graphs", [("vision",), wide(("vision", "prefill", "decode"))])
def test_a_bfloat16_checkpoint_is_traced_in_float32_and_equals_stock(half, graphs):
    skeleton = hf.skeleton(half.path, family)
    assert {p.dtype for p in skeleton.parameters()} == {torch.float32}
    inputs = probe(half.shape, half.tower, half.config)
    hf.write_weights(half.path, family, half.folder, half.tower, inputs, silent)
    expected = reference(half.model, inputs, half.tower)  # stock, loaded as float32
    recorded = hf.read_reference(half.folder)
    for name in ("image_embeds", "logits", "step_logits"):
        agrees("same numbers", recorded[name], expected[name])
    traced = {s.name: trace.trace(s) for s in trace.specs(skeleton, family, half.config) if s.name in graphs}
    bound = {n: pipeline.dense(n, graph, half.weights.tensors, family)[0] for n, graph in traced.items()}
    seen = Backend(bound.get, half.weights, 1).vision(half.tower.feeds(inputs.pictures))
    agrees("export", seen["image_embeds"], expected["image_embeds"])


def test_weights_are_taken_as_stored_whatever_config_json_claims(tmp_path):
    path = random_checkpoint(random_config(1), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert hf.stored_dtype(path) == "float32"
    loaded = dict(hf.load(path, family, hf.stored_dtype(path)).named_parameters())
    raw = load_file(path / "model.safetensors")
    assert all(torch.equal(loaded[name], raw[name]) for name in loaded if name in raw)


def test_a_head_that_differs_from_the_embedding_is_not_tied(tmp_path):
    """As in from_pretrained, which believes the weights and not tie_word_embeddings."""
    config = random_config(1)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    path = random_checkpoint(config, tmp_path / "model")
    raw = load_file(path / "model.safetensors")
    embedding = next(n for n in raw if n.endswith("embed_tokens.weight"))
    tied = dict(hf.skeleton(path, family).named_parameters())
    assert "lm_head.weight" not in tied
    save_file(raw | {"lm_head.weight": raw[embedding] + 1}, path / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    read = hf.read_config(path)
    shape, tower = family.shape(read), family.tower(read)
    hf.write_weights(path, family, tmp_path / "out", tower, probe(shape, tower, config), silent)
    written = hf.reading(path, tmp_path / "out" / weights.FILE, family)
    assert torch.equal(written.lm_head.weight, raw[embedding] + 1)
    assert set(dict(hf.skeleton(path, family).named_parameters())) == {*tied, "lm_head.weight"}


def test_the_picture_rule_of_a_newer_processor_file_is_used(tmp_path):
    rule = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 64, "longest_edge": 4096}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": rule, "processor_class": "x"}))
    processor_files.copy(tmp_path, tmp_path / "processor")
    read = image_rule(json.loads((tmp_path / "processor" / "preprocessor_config.json").read_text()))
    assert (read.mean, read.min_pixels, read.max_pixels) == ((0.1, 0.2, 0.3), 64, 4096)


def test_an_image_token_outside_the_vocabulary_is_refused(tmp_path):
    config = hf.read_config(random_checkpoint(random_config(1), tmp_path / "m"))
    with pytest.raises(InputError, match="image_token_id"):
        family.check_config(config | {"image_token_id": config["text_config"]["vocab_size"]})


def test_rows_of_an_older_request_stay_its_own(exported):
    """Memory is used again once nobody holds the rows in it, and not before."""
    x = exported(1)
    rows = gatherer(x.weights, x.family, x.shape.layers)
    ids = np.zeros((x.shape.layers, 1, 1), np.int32)
    older = rows.gather(core_sets(ids, x.shape.ffn))
    kept = {name: np.array(value) for name, value in older.rows.items()}
    newer = rows.gather(core_sets(ids + 1, x.shape.ffn))
    for name, value in older.rows.items():
        np.testing.assert_array_equal(value, kept[name])
        assert not np.shares_memory(value, newer.rows[name])
    place = older.rows["ffn.0.up"].ctypes.data
    del older, value
    assert rows.gather(core_sets(ids + 2, x.shape.ffn)).rows["ffn.0.up"].ctypes.data == place
