"""The bench of low-bit weights: what it puts into a model and takes out again, and that the page says what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _page import into
from transformers import LlamaConfig, LlamaForCausalLM

from cm_export.quant.choose import by_inputs, quantise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("precision", ROOT / "benchmarks" / "precision.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["precision"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)).eval()


@pytest.fixture
def rounding(bench, llama):
    found = bench.Rounding(bench.products(llama.model.layers, llama.lm_head))
    with torch.no_grad(), found.watching():
        for seed in range(3):
            llama(torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(seed)))
    return found


def test_the_page_shows_the_committed_figures(bench):
    report = json.loads((ROOT / "benchmarks" / "quality" / "precision.json").read_text())
    page = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    assert into(page, bench.tables(report)) == page
    for title, rows in bench.ways().items():
        assert [r["way"] for r in report[title]] == [w.name for w in rows]


def test_what_a_build_stores_is_what_won():
    report = json.loads((ROOT / "benchmarks" / "quality" / "precision.json").read_text())
    rows = {r["way"]: r for title in ("methods", "groups", "parts") for r in report[title]}
    off = {way: row["off_grid"] for way, row in rows.items()}
    chosen = off["4 bits: FFN, q, k, o; 8: v, head; zeros, x in 8 bits"]
    for other in ("FFN, attention; 8: head; zeros, x in 8 bits", "FFN, q, k, o; 8: v, head", "FFN, attention; 8: head"):
        assert chosen["kl"] < off[f"4 bits: {other}"]["kl"]
    assert rows["8 bits: all, groups of 32, GPTQ"]["smollm2"]["agreement"] >= 0.98
    for kind in ("symmetric", "with zeros"):
        best = off[f"FFN, {kind}, GPTQ"]["kl"]
        assert all(
            best < f["kl"] for way, f in off.items() if way.startswith(f"FFN, {kind}") and way != f"FFN, {kind}, GPTQ"
        )
    for row in rows.values():
        assert all(row[task]["of_dense"] >= 0.99 for task in ("scenes", "easy_vqa") if task in row)


def test_every_product_of_a_decoder_is_watched_and_rounded_and_comes_back(bench, llama, rounding):
    assert len(rounding.products) == 2 * 7 + 1
    names = {p.name for p in rounding.products}
    assert {"layers.1.down", "layers.0.v", "head"} <= names
    before = {n: p.clone() for n, p in llama.named_parameters()}
    for method in bench.METHODS:
        with rounding.stored(bench.Way("w", {"ffn": 4, "attention": 4, "head": 8}, 32, False, method)) as bits:
            assert 4.75 < bits < 8.75
            changed = {n for n, p in llama.named_parameters() if not torch.equal(p, before[n])}
            assert changed == {n for n, p in before.items() if p.dim() == 2}, method
        assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())


def test_what_the_model_runs_with_is_what_would_be_stored(bench, rounding):
    product = next(p for p in rounding.products if p.name == "layers.1.down")
    dense = product.module.weight.detach().clone().numpy()
    stored = quantise(dense.T, by_inputs(4, 32), "down", rounding.inputs(product)).numbers()[: dense.shape[1]].T
    with rounding.stored(bench.Way("w", {"ffn": 4}, 32, False, "default")):
        np.testing.assert_array_equal(product.module.weight.detach().numpy(), stored)


def test_inputs_that_are_shared_are_watched_once_and_given_to_all(rounding):
    by_name = {p.name: rounding.inputs(p) for p in rounding.products}
    for one, other in (("layers.0.gate", "layers.0.up"), ("layers.1.q", "layers.1.v")):
        np.testing.assert_array_equal(by_name[one].gram, by_name[other].gram)
    for product in rounding.products:
        assert by_name[product.name].gram.shape == (product.module.in_features,) * 2
        np.testing.assert_allclose(by_name[product.name].square, np.diagonal(by_name[product.name].gram))


def test_inputs_are_rounded_to_127_steps_of_the_largest_in_their_group(bench):
    x = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    for group in (32, 64):
        found = bench.in_8_bits(x, group)
        assert found.shape == x.shape and (found[0, 0] == 0).all()
        for start in range(0, 72, group):
            part, own = found[..., start : start + group], x[..., start : start + group]
            limit = own.abs().amax(-1, keepdim=True) / 254 * 1.0001
            assert ((part - own).abs() <= limit).all() and (part[1, 2].unique().numel() > 20 or part.shape[-1] < 32)


def test_blur_moves_every_weight_by_half_a_step_at_most(bench, llama):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    bench.blur(llama)
    for name, matrix in llama.named_parameters():
        if matrix.dim() != 2:
            assert torch.equal(matrix, before[name])
            continue
        groups, own = matrix.data.view(-1, 32), before[name].view(-1, 32)
        step = (own.amax(1) - own.amin(1)) / (31 if "embed" in name else 15)
        off = (groups - own).abs()
        assert (off <= step[:, None] / 2 * 1.001).all() and (off > 0).float().mean() > 0.99
