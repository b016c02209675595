"""What stands in for dropped neurons, how many each layer keeps, and blocks: laws on random models, by independent roads."""

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SEEDS, Exported, family
from stepping import Decoder, constants, every_neuron, gathered, gatherer, prefill, step_feeds
from test_surgery import arrays, request
from tolerances import agrees

from cm_export.base.core_index import check_core_neurons, select_core_neurons
from cm_export.base.errors import InputError
from cm_export.bundle import weights
from cm_export.bundle.calibration import Calibration
from cm_export.bundle.names import core_row_names
from cm_export.host.core_set import CoreSet, choose
from cm_export.host.layer_budgets import LEAST, STEP, _convex, allot, layer_counts
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.recipe.recipe import Neurons, Recipe
from cm_export.source import model as hf
from cm_export.surgery import pipeline

CASES = settings(max_examples=40, deadline=None)
seeds = pytest.mark.parametrize("seed", SEEDS)
CALIBRATED = {"tokens__policy": "dense", "calibration": "made up"}


def made_up(x, seed=0) -> Calibration:
    """A calibration of no meaning that fits the model."""
    rng, shape = np.random.default_rng(seed), x.shape
    energy = rng.random((shape.layers, shape.ffn)).astype(np.float32)
    mean_z = rng.standard_normal((shape.layers, shape.ffn)).astype(np.float32)
    down = [np.array(x.weights[d]) for *_, d in core_row_names(family, shape.layers)]
    mean_y = np.stack([z @ w for z, w in zip(mean_z, down, strict=True)])
    steep = (10.0 ** np.arange(shape.layers))[:, None] * np.array([[3.0, 1.0, 0.3]])
    shares = np.array([0.25, 0.5, 0.75], np.float32)
    order = np.stack([rng.permutation(shape.ffn) for _ in range(shape.layers)]).astype(np.int32)
    return Calibration(energy, mean_z, mean_y, steep.astype(np.float32), shares, order, {})


def rows_of(x):
    return gatherer(x.weights, x.family, x.shape.layers)


def cache_of(out):
    return {n: v for n, v in out.items() if n.startswith("present.")}


def watched(x, req):
    """z [L][S,F] of stock transformers on a prompt, by hooks."""
    z, handles = {}, []

    def watch(i):
        def hook(_module, inputs, _output):
            z[i] = inputs[0][0].detach().numpy()

        return hook

    lm = x.model.model.language_model
    for i, layer in enumerate(lm.layers):
        handles.append(layer.mlp.down_proj.register_forward_hook(watch(i)))
    with torch.no_grad():
        lm(inputs_embeds=torch.from_numpy(req.inputs_embeds), position_ids=torch.from_numpy(req.position_ids))
    for handle in handles:
        handle.remove()
    return [z[i] for i in range(len(z))]


# ------------------------------------------------------------------------------------------------ fill
@seeds
@pytest.mark.parametrize("image_weight", [1.0, 0.25, 0.0])
def test_prefill_reports_the_weighted_means_that_pytorch_sees(exported, seed, image_weight):
    x = exported(seed)
    recipe = Recipe().replace(tokens__policy="dense", neurons__fill="prompt", neurons__image_weight=image_weight)
    req = request(x, seed)
    out = arrays(prefill(x.backend(recipe), prefill_feeds(req)))
    weight = np.where(req.is_image[0], image_weight, 1.0)
    for i, z in enumerate(watched(x, req)):
        mean = np.average(z.astype(np.float64), axis=0, weights=weight)
        agrees("export", out["core_mean_z"][i, 0], mean)
        agrees("export", out["core_mean_y"][i, 0], mean @ x.weights[core_row_names(family, i + 1)[i][2]])
        energy = np.average((z / np.linalg.norm(z, axis=1, keepdims=True)) ** 2, axis=0, weights=weight)
        agrees("export", out["core_scores"][i, 0] / weight.sum(), energy)


@seeds
def test_only_kept_tokens_enter_the_means(exported, seed):
    x = exported(seed)
    recipe = Recipe().replace(tokens__policy="random", tokens__prune_layer=1, neurons__fill="prompt")
    req = request(x, seed)
    out = arrays(prefill(x.backend(recipe), prefill_feeds(req) | sparse_feeds(req, recipe, 0.3)))
    kept = out["kept_tokens"][0]
    assert len(kept) < req.tokens
    first = watched(x, req)[0]  # the layer before the cut sees every token, in both
    agrees("export", out["core_mean_z"][0, 0], first[kept].mean(0))
    assert np.abs(first[kept].mean(0) - first.mean(0)).max() > 1e-2


@seeds
@pytest.mark.parametrize("fill", ["prompt", "calibrated"])
@pytest.mark.parametrize("layers", ["uniform", "calibrated"])
def test_decode_computes_the_kept_neurons_and_the_mean_of_the_others(exported, seed, fill, layers):
    """Gathered rows = the portable graph = stock FFNs in which z of dropped neurons is replaced by its mean."""
    x = exported(seed)
    calibration = made_up(x)
    recipe = Recipe().replace(neurons__fill=fill, neurons__layers=layers, neurons__share=0.4, **CALIBRATED)
    backend, req, rows = x.backend(recipe, calibration), request(x, seed), rows_of(x)
    out = prefill(backend, prefill_feeds(req))
    core = choose(arrays(out), recipe.neurons, x.shape, calibration)
    assert (len(set(core.counts.tolist())) > 1) == (layers == "calibrated")
    fixed = constants(core, rows)
    feeds, cache = step_feeds(req, 9, 0), cache_of(out)
    got = Decoder(backend, "decode", cache, fixed).step(feeds)
    portable = Decoder(backend, "decode", cache, dict(fixed), rows_as_inputs=False).step(feeds)
    agrees("export", portable, got)
    agrees("export", got, replaced(x, req, core, 9))
    unfilled = Decoder(backend, "decode", cache, fixed | {"core_bias": 0 * fixed["core_bias"]}).step(feeds)
    assert np.abs(unfilled - got).max() > 1e-3, "the bias must matter"


def replaced(x, req, core, token):
    """Logits of one more token: transformers' layers, dropped z replaced by core.mean_z for the last token only."""
    lm, handles = x.model.model.language_model, []

    def change(i):
        def hook(_module, inputs):
            z = inputs[0].clone()
            dropped = np.setdiff1d(np.arange(x.shape.ffn), core.neurons[i, 0, : core.counts[i]])
            z[0, -1, dropped] = torch.from_numpy(core.mean_z[i, 0, dropped])
            return (z,)

        return hook

    for i, layer in enumerate(lm.layers):
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(change(i)))
    step = step_feeds(req, token, 0)
    embeds = np.concatenate([req.inputs_embeds, step["inputs_embeds"]], 1)
    positions = np.concatenate([req.position_ids, step["position_ids"]], 2)
    with torch.no_grad():
        h = lm(inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions)).last_hidden_state
        logits = x.model.lm_head(h[:, -1]).numpy()
    for handle in handles:
        handle.remove()
    return logits


@seeds
@pytest.mark.parametrize("fill", ["prompt", "calibrated"])
@pytest.mark.parametrize("layers", ["uniform", "calibrated"])
def test_full_budget_with_fill_is_dense_to_the_bit(exported, seed, fill, layers):
    x = exported(seed)
    calibration = made_up(x)
    recipe = Recipe().replace(neurons__fill=fill, neurons__layers=layers, neurons__share=1.0, **CALIBRATED)
    backend, req, rows = x.backend(recipe, calibration), request(x, seed), rows_of(x)
    out = prefill(backend, prefill_feeds(req))
    fixed = constants(choose(arrays(out), recipe.neurons, x.shape, calibration), rows)
    assert not fixed["core_bias"].any()
    dense = Decoder(backend, "decode_dense", cache_of(out), {})
    sparse = Decoder(backend, "decode", cache_of(out), fixed)
    for step, token in enumerate((9, 8)):
        np.testing.assert_array_equal(
            sparse.step(step_feeds(req, token, step)), dense.step(step_feeds(req, token, step))
        )


@CASES
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**32 - 1), st.data()
)
def test_the_bias_is_the_summed_mean_of_the_dropped(layers, batch, ffn, hidden, seed, data):
    rng = np.random.default_rng(seed)
    counts = np.array([data.draw(st.integers(1, ffn)) for _ in range(layers)])
    scores = rng.standard_normal((layers, batch, ffn)).astype(np.float32)
    neurons = select_core_neurons(scores, counts)
    mean_z = rng.standard_normal((layers, batch, ffn)).astype(np.float32)
    down = rng.standard_normal((layers, ffn, hidden)).astype(np.float32)
    rows = [[a[:, b : b + 1] for a in (neurons, mean_z, mean_z @ down)] for b in range(batch)]
    cores = [CoreSet(ids, counts, ffn, z, y) for ids, z, y in rows]
    got = np.stack([core.bias(list(down)) for core in cores], 1)
    for i, b in np.ndindex(layers, batch):
        dropped = sorted(set(range(ffn)) - set(neurons[i, b, : counts[i]].tolist()))
        agrees("op float32", got[i, b], sum((mean_z[i, b, n] * down[i, n] for n in dropped), np.zeros(hidden)))


# ------------------------------------------------------------------------------------------------ layers
@seeds
def test_ids_behind_a_layers_count_are_never_read(exported, seed):
    x = exported(seed)
    recipe = Recipe().replace(neurons__layers="calibrated", **CALIBRATED)
    backend, req = x.backend(recipe, made_up(x)), request(x, seed)
    cache = cache_of(prefill(backend, prefill_feeds(req)))
    counts = np.arange(3, 3 + x.shape.layers)
    index = select_core_neurons(
        np.random.default_rng(seed).random((x.shape.layers, 1, x.shape.ffn), np.float32), counts
    )
    check_core_neurons(index, x.shape.layers, 1, x.shape.ffn, counts)
    fed = [index, np.where(index < 0, 0, index)]
    assert not np.array_equal(*fed)
    given_ = [{"core_neurons": i, "core_counts": counts} for i in fed]
    steps = [Decoder(backend, "decode", cache, g, rows_as_inputs=False).step(step_feeds(req, 9, 0)) for g in given_]
    np.testing.assert_array_equal(*steps)
    from_rows = Decoder(backend, "decode", cache, gathered(rows_of(x), index, counts)).step(step_feeds(req, 9, 0))
    agrees("export", from_rows, steps[0])


@st.composite
def curves(draw, layers=None):
    """Falling curves of every kind, some not convex, some rising by noise: sensitivity [L,P], shares [P]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = np.sort(rng.choice(np.arange(1, 10), draw(st.integers(1, 5)), replace=False)) / 10
    kl = np.sort(rng.random((layers or draw(st.integers(1, 5)), len(shares))) ** 3, axis=1)[:, ::-1]
    return (kl + draw(st.sampled_from([0, 0.1])) * rng.random(kl.shape)).astype(np.float32), shares.astype(np.float32)


@CASES
@given(curves(), st.integers(1, 500), st.floats(0.01, 1))
def test_layer_budgets_sum_to_the_total_and_stay_in_range(case, most, share):
    sensitivity, shares = case
    each = max(1, round(share * most))
    counts = allot(sensitivity, shares, each * len(sensitivity), most)
    assert counts.sum() == each * len(sensitivity)
    assert counts.min() >= max(1, int(each * LEAST)) and counts.max() <= most


@CASES
@given(curves(3), st.integers(3, 24))
def test_layer_budgets_are_the_best_of_all(case, total):
    """Against every possible split, on the convex curves that the marginal analysis works with."""
    sensitivity, shares = case
    most = 8
    hulls = [_convex(np.append(shares, 1.0), np.append(row, 0.0)) for row in sensitivity.astype(np.float64)]

    def cost(split):
        return sum(np.interp(k / most, *hull) for k, hull in zip(split, hulls, strict=True))

    least = max(1, int(total // 3 * LEAST))
    splits = [s for s in itertools.product(range(least, most + 1), repeat=3) if sum(s) == total]
    assert cost(allot(sensitivity, shares, total, most)) <= min(map(cost, splits)) + 1e-9


@CASES
@given(st.integers(1, 6), st.integers(64, 500), st.floats(0.1, 1))
def test_equal_layers_get_equal_budgets(layers, most, share):
    each = max(1, round(share * most))
    counts = allot(np.tile([0.5, 0.1], (layers, 1)), np.array([0.3, 0.6]), each * layers, most)
    assert counts.max() - counts.min() <= max(1, int(most * STEP))


def test_the_more_sensitive_layer_keeps_more():
    counts = allot(np.array([[1.0, 0.5], [0.01, 0.005]]), np.array([0.3, 0.6]), 100, 100)
    assert counts.tolist() == [75, 25]


def test_layer_counts_are_whole_blocks(exported):
    calibration = made_up(exported(1))
    for layers, block in itertools.product(("uniform", "calibrated"), (1, 8)):
        counts = layer_counts(Neurons(layers=layers, block=block), 0.3, len(calibration.energy), 160, calibration)
        assert not (counts % block).any() and counts.mean() == 48


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, c: (i, c[:1]), "core_counts"),
        (lambda i, c: (i, c * 0), "core_counts"),
        (lambda i, c: (i, c + 3), "core_counts"),
        (lambda i, c: (np.where(i < 0, 5, i), c), "fill up with -1"),
        (lambda i, c: (i, c[::-1]), "layer 0"),
    ],
)
def test_damaged_counts_are_refused(change, says):
    index, counts = np.array([[[0, 2, -1]], [[1, 2, 3]]], np.int32), np.array([2, 3])
    check_core_neurons(index, 2, 1, 6, counts)
    with pytest.raises(InputError, match=says):
        check_core_neurons(*change(index, counts)[:1], 2, 1, 6, change(index, counts)[1])


# ------------------------------------------------------------------------------------------------ blocks
@CASES
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 8),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_blocks_are_chosen_by_their_summed_score(layers, batch, blocks, block, seed, data):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (layers, batch, blocks * block)).astype(np.float32)
    counts = np.array([data.draw(st.integers(1, blocks)) for _ in range(layers)])
    got = select_core_neurons(scores, counts * block, block)
    check_core_neurons(got, layers, batch, blocks * block, counts * block)
    for i, b in np.ndindex(layers, batch):
        sums = [scores[i, b, k * block : (k + 1) * block].sum() for k in range(blocks)]
        best = sorted(sorted(range(blocks), key=lambda k: (-sums[k], k))[: counts[i]])
        expected = [k * block + n for k in best for n in range(block)]
        assert got[i, b, : len(expected)].tolist() == expected


def test_what_is_no_whole_block_is_refused(exported):
    with pytest.raises(InputError, match="whole blocks of 8"):
        select_core_neurons(np.zeros((1, 1, 24), np.float32), 12, 8)
    with pytest.raises(InputError, match="whole blocks of 8"):
        select_core_neurons(np.zeros((1, 1, 20), np.float32), 8, 8)
    odd = replace(exported(1).shape, ffn=97)
    with pytest.raises(InputError, match="whole blocks of 32"):
        pipeline.check_recipe(Recipe().replace(neurons__block=32, tokens__policy="dense"), odd)


@dataclass(frozen=True)
class Reordered(Exported):
    """The same checkpoint with the neurons of every layer stored in another order: same graphs, same byte ranges."""

    dense: dict[str, Any] = field(kw_only=True)

    @cached_property
    def order(self):
        rng = np.random.default_rng(5)
        return np.stack([rng.permutation(self.shape.ffn) for _ in range(self.shape.layers)])

    @cached_property
    def weights(self):
        file = self.folder / weights.FILE
        named = self.model.named_parameters()
        weights.write(file, [hf.planned(n, p, family, hf.neuron_order(n, family, self.order)) for n, p in named])
        for name, parameter in self.model.named_parameters():
            hf._compare(file, name, parameter, family, self.path, hf.neuron_order(name, family, self.order))
        return weights.WeightFile(file)


@seeds
@pytest.mark.parametrize("policy", ["griffin", "coreinfer", "glass", "glass_rank"])
def test_law_b_reordered_weights_are_the_same_model_with_other_ids(exported, seed, policy, tmp_path):
    x = exported(seed)
    y = Reordered(x.path, tmp_path, dense=x.dense)
    calibration = made_up(x)
    recipe = Recipe().replace(neurons__policy=policy, neurons__row_norm=True, **CALIBRATED)
    req = request(x, seed)
    placed = Calibration(**{**calibration.__dict__, "order": y.order.astype(np.int32)}).reordered()
    backends = x.backend(recipe, calibration), y.backend(recipe, placed)
    outs = [prefill(b, prefill_feeds(req)) for b in backends]
    for name in cache_of(outs[0]) | {"logits": 0}:
        agrees("export", outs[1][name].numpy(), outs[0][name].numpy())
    scores = [o["core_scores"].numpy() for o in outs]
    moved = np.take_along_axis(scores[0], y.order[:, None], axis=2)
    agrees("export", scores[1], moved)
    count = x.shape.ffn // 3
    core = select_core_neurons(scores[1], count)
    back = np.sort(np.take_along_axis(y.order[:, None], core.astype(np.int64), 2)).astype(np.int32)
    if policy in ("griffin", "glass"):  # without ties, the ids are the permuted ids
        np.testing.assert_array_equal(back, select_core_neurons(scores[0], count))
    steps = [
        Decoder(b, "decode", cache_of(o), gathered(rows_of(m), ids)).step(step_feeds(req, 9, 0))
        for b, o, m, ids in zip(backends, outs, (x, y), (back, core), strict=True)
    ]
    agrees("export", steps[1], steps[0])


def test_a_weight_stored_in_a_wrong_place_is_noticed(exported, tmp_path):
    """The build compares the reordered file with the checkpoint by the inverse order."""
    x = exported(1)
    y = Reordered(x.path, tmp_path, dense=x.dense)
    assert y.weights
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    wrong = hf.neuron_order(name, family, y.order).copy()
    wrong[:2] = wrong[1::-1]
    with pytest.raises(hf.GateFailed, match="differs from the checkpoint"):
        hf._compare(y.weights.path, name, dict(x.model.named_parameters())[name], family, x.path, wrong)


def test_every_neuron_reads_the_mapped_file_and_needs_no_bias(exported):
    x = exported(1)
    out = every_neuron(rows_of(x))
    assert not out["core_bias"].any() and out["core_bias"].shape == (x.shape.layers, 1, x.shape.hidden)
    assert out["core_counts"].tolist() == [x.shape.ffn] * x.shape.layers
    assert all(a.shape[1] == x.shape.ffn for n, a in out.items() if n.startswith("ffn."))
