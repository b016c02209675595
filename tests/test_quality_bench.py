"""The bench of neuron policies on a real language model: its parts against oracles, and that the docs say what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from _page import into
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("neuron_quality", ROOT / "benchmarks" / "neuron_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["neuron_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_committed_figures(bench):
    report = json.loads((ROOT / "benchmarks" / "quality" / "smollm2-135m.json").read_text())
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert into(page, {"table": bench.table(report)}) == page
    rows = {(r["method"], r["bytes_share"]): r for r in report["rows"]}
    predicted = "predicted (4-bit copy as a bundle stores it)"
    active, random = "active (thresholds on x and z)", "random channels of x and z"
    claimed = ((predicted, 0.6), (predicted, 0.7), ("3-bit copy of gate and up", 0.6))
    for method, share in (*claimed, (active, 0.6), (active, 0.7), (random, 0.6), (random, 0.7)):
        row = rows[method, share]
        assert row["neurons"] / row["ffn"] + row["predictor_share"] <= share, "the predictor's bytes count"
        assert f"{row['agreement']:.3f}"[1:] in page.split("What it says")[1]
    kinds = {r["kind"] for r in report["rows"]}
    assert kinds == {"control", "fixed set", "per token", "oracle"}


def test_bytes_read_stay_within_the_share(bench):
    read_gate = bench.Method("x", "per token", None, gate_is_read=True)
    copy = bench.Method("y", "per token", None, predictor_share=0.1)
    for share in (0.4, 0.6, 0.9):
        assert (
            1 / 3 + 2 / 3 * read_gate.kept(share, 1536) / 1536
            <= share
            < 1 / 3 + 2 / 3 * (read_gate.kept(share, 1536) + 2) / 1536
        )
        assert 0.1 + copy.kept(share, 1536) / 1536 <= share < 0.1 + (copy.kept(share, 1536) + 2) / 1536
    assert read_gate.kept(0.3, 1536) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_low_bit_copy_has_that_many_levels_and_gets_better_with_bits(bench, bits):
    weight = torch.randn(7, 128, generator=torch.Generator().manual_seed(bits))
    copy = bench.low_bit(weight, bits)
    for group in copy.reshape(-1, bench.GROUP):
        assert len(group.unique()) <= 2**bits
    error = (copy - weight).square().mean().item()
    # Lloyd's optimum for a Gaussian: .363, .118, .035, .0095; evenly spaced levels with a scale per group come near it
    assert error < {1: 0.40, 2: 0.14, 3: 0.05, 4: 0.016}[bits]


def test_a_low_rank_copy_is_best_for_the_inputs_it_was_fitted_on(bench):
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(30, 16, generator=rng), torch.randn(200, 16, generator=rng) * torch.linspace(3, 0.01, 16)
    fitted = bench.low_rank(weight, x, 4)
    assert torch.linalg.matrix_rank(fitted, tol=1e-3) == 4
    # Eckart-Young: no rank-4 matrix of outputs is nearer to x W^T than its own truncation
    best = torch.linalg.svdvals(x @ weight.T)[4:].norm()
    assert best * 0.999 <= (x @ (fitted - weight).T).norm() <= best * 1.01
    u, s, v = torch.linalg.svd(weight)
    plain = (u[:, :4] * s[:4]) @ v[:4]
    assert (x @ (plain - weight).T).norm() > best * 1.1, "the inputs' covariance must matter here"


def test_thresholds_leave_out_the_share_that_is_asked_for_on_both_sides(bench):
    """Against a loop over tokens and channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = bench.Model.__new__(bench.Model)
    model.model, model.seen, model.inputs, model._keep = LlamaForCausalLM(config).eval(), {}, {}, None
    model.adopt()
    model.ids = lambda prompt: torch.tensor([[3, 7, 9]])
    model.answer = lambda ids: torch.tensor([[4, 11, 2, 30]])
    with torch.no_grad():
        xs = [torch.randn(400, 32), torch.randn(400, 32)]
        sites = bench.neuron_thresholds.Sites(model, xs, ["a"])
        shares = sites.table.shares(0.5, 1.0)
        limits, m, x = sites.table.at(shares), model.ffns[1], xs[1]
        kept = (x.abs() * sites.norms[2] >= float(limits[4])).float()
        assert kept.mean().item() == pytest.approx(shares[4], abs=0.02)
        z = torch.nn.functional.silu((x * kept) @ m.gate_proj.weight.T) * ((x * kept) @ m.up_proj.weight.T)
        z = z * (z.abs() * m.down_proj.weight.norm(dim=0) >= float(limits[5]))
        torch.testing.assert_close(sites.above(limits)(1, x, x, z), z)
        drawn = sites.at_random(shares)(1, x, x, z)
        assert (drawn != 0).any(0).float().mean().item() == pytest.approx(shares[5], abs=0.02)
        everything = sites.above(sites.table.at(sites.table.shares(1.0, 1.0)))
        ids, answer = model.ids(""), model.answer(None)
        torch.testing.assert_close(model.read(ids, answer, everything), model.read(ids, answer, None))


def test_with_every_neuron_the_sparse_reading_is_the_dense_model(bench, tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    stock = LlamaForCausalLM(config).eval()
    stock.save_pretrained(tmp_path)
    model = bench.Model.__new__(bench.Model)
    model.model, model.seen, model.inputs, model._keep = stock, {}, {}, None
    ids, answer = torch.randint(1, 50, (1, 9)), torch.randint(1, 50, (1, 6))
    with torch.no_grad():
        expected = stock(torch.cat([ids, answer], 1)).logits[0, 8:14]
        model.adopt()
        everything = bench.sparse(bench.Method("all", "control", None), lambda i, x, a, z: z.abs(), 48, [])
        assert (model.read(ids, answer, everything) - expected).abs().max() < 1e-5
        half = bench.sparse(bench.Method("half", "control", None), lambda i, x, a, z: z.abs(), 12, [])
        assert (model.read(ids, answer, half) - expected).abs().max() > 1e-3
