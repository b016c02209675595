"""Laws of the rewrites: what a cut means, that every layer reads its own neurons, that nothing is found by position."""

import numpy as np
import onnx
import pytest
from random_models import SEEDS, copy, family, request
from stepping import Decoder, every_row, gathered, gatherer, prefill, step_feeds
from tolerances import agrees

from cm_export.base.core_index import select_core_neurons
from cm_export.base.errors import InputError, SurgeryError
from cm_export.bundle.names import core_row_names
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.recipe.recipe import Recipe
from cm_export.surgery import pipeline
from cm_export.surgery.edit import Edit
from cm_export.surgery.find_sites import attention_sites, ffn_sites

seeds = pytest.mark.parametrize("seed", SEEDS)


def arrays(outputs):
    return {n: v.numpy() for n, v in outputs.items()}


def deepstack(x, req, layer):
    """What stock Qwen3-VL adds after a layer; of other models nothing."""
    import torch

    return torch.from_numpy(req.rows.get(f"deepstack_{layer}", np.zeros((), np.float32)))


def masked_prefill(x, req, dropped, layer):
    """Dense transformers layers, dropped tokens masked as keys from `layer` on: the meaning of the cut, by another road.

    `dropped`: columns, or a function of the layer that gives them.
    """
    import torch
    from torch.nn import functional as F

    lm = x.model.get_decoder()
    h = torch.from_numpy(req.inputs_embeds)
    positions = torch.from_numpy(req.position_ids)
    cos, sin = lm.rotary_emb(h, positions if len(positions) > 1 else positions[0])
    n = h.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    keys = []

    def turn(t):
        a, b = t.chunk(2, -1)
        return t * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    with torch.no_grad():
        for i, block in enumerate(lm.layers):
            a, z = block.self_attn, block.input_layernorm(h)
            q, k, v = (p(z).view(1, n, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            q, k = turn(q), turn(k)
            keys.append((k, v))
            allowed = causal.clone()
            if i >= layer:
                allowed[:, dropped(i) if callable(dropped) else dropped] = False
                allowed |= torch.eye(n, dtype=torch.bool)  # a dropped row may read itself; nobody reads it
            g = a.num_key_value_groups
            o = F.scaled_dot_product_attention(q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1), allowed)
            h = h + a.o_proj(o.transpose(1, 2).reshape(1, n, -1))
            h = h + block.mlp(block.post_attention_layernorm(h))
            h = h + deepstack(x, req, i)
        return x.model.lm_head(lm.norm(h[:, -1])).numpy(), keys


@seeds
@pytest.mark.parametrize("policy", ["overlap", "attention", "random"])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_cut_prefill_is_the_dense_one_with_dropped_tokens_masked(exported, seed, policy, share):
    x = exported(seed)
    recipe = Recipe().replace(tokens__policy=policy, tokens__prune_layer=1, seed=seed)
    backend, req = x.backend(recipe), request(x, seed)
    out = arrays(prefill(backend, prefill_feeds(req) | sparse_feeds(req, recipe, share)))
    kept = out["kept_tokens"][0]
    assert len(kept) < req.tokens and (np.diff(kept) > 0).all()
    assert set(np.flatnonzero(~req.is_image[0])) <= set(kept), "text always stays"
    assert req.is_image[0, kept].sum() == sparse_feeds(req, recipe, share)["image_keep"][0]
    dropped = np.setdiff1d(np.arange(req.tokens), kept)
    logits, keys = masked_prefill(x, req, dropped, 1)
    agrees("export", out["logits"], logits)
    for i, (k, v) in enumerate(keys):
        agrees("export", out[f"present.{i}.key"], k.numpy()[:, :, kept])
        agrees("export", out[f"present.{i}.value"], v.numpy()[:, :, kept])


@seeds
def test_decode_over_an_index_equals_decode_over_the_cut_cache(exported, seed):
    """CoreAttention reading listed rows of the whole cache = the same cache with the other rows removed."""
    x = exported(seed)
    recipe = Recipe().replace(
        tokens__policy="random", tokens__prune_layer=1, tokens__cache="index", neurons__policy="dense"
    )
    backend, req = x.backend(recipe), request(x, seed)
    out = prefill(backend, prefill_feeds(req) | sparse_feeds(req, recipe, 0.4))
    kept = out["kept_tokens"].numpy()
    cache = {n: v for n, v in out.items() if n.startswith("present.")}
    assert cache["present.0.key"].shape()[2] == req.tokens
    rows = every_row(gatherer(x.weights, x.family, x.shape.layers))
    indexed = Decoder(backend, "decode", cache, rows)
    import onnxruntime as ort

    short = {
        n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v.numpy()[:, :, kept[0]])) for n, v in cache.items()
    }
    dense = Decoder(backend, "decode_dense", short, {})
    ones = np.ones_like(kept, np.int64)
    for step, token in enumerate((9, 8, 7)):
        a = indexed.step(step_feeds(req, token, step, core_tokens=kept))
        b = dense.step(step_feeds(req, token, step, kept_mask=ones))
        agrees("same numbers", a, b)


@seeds
@pytest.mark.parametrize("policy", ["coreinfer", "griffin", "random"])
def test_decode_computes_exactly_the_chosen_neurons_of_its_own_layer(exported, seed, policy):
    """Gathered rows = the portable graph that gathers inside = dense decode with the other neurons' down rows zeroed."""
    x = exported(seed)
    recipe = Recipe().replace(tokens__policy="dense", neurons__policy=policy, seed=seed)
    backend, req = x.backend(recipe), request(x, seed)
    out = prefill(backend, prefill_feeds(req) | sparse_feeds(req, recipe))
    core = select_core_neurons(out["core_scores"].numpy(), max(1, x.shape.ffn // 3))
    names = core_row_names(family, x.shape.layers)
    cache = {n: v for n, v in out.items() if n.startswith("present.")}
    source = gatherer(x.weights, x.family, x.shape.layers)
    from_rows = Decoder(backend, "decode", cache, gathered(source, core))
    portable = Decoder(backend, "decode", cache, {"core_neurons": core}, rows_as_inputs=False)
    rows = {}
    for i, parts in enumerate(names):
        for part, name in zip(("gate", "up", "down"), parts, strict=True):
            w = np.array(x.weights[name])
            if part == "down":
                w[np.setdiff1d(np.arange(x.shape.ffn), core[i, 0])] = 0
            rows[f"ffn.{i}.{part}"] = w[None]
    masked = Decoder(backend, "decode", cache, rows)
    feeds = step_feeds(req, 9, 0)
    expected = masked.step(feeds)
    agrees("export", from_rows.step(feeds), expected)
    agrees("export", portable.step(feeds), expected)
    swapped = Decoder(backend, "decode", cache, gathered(source, np.ascontiguousarray(core[::-1])))
    assert np.abs(swapped.step(feeds) - expected).max() > 1e-3, "another layer's neurons must give another answer"


@seeds
def test_a_batch_of_prompts_is_cut_row_by_row(exported, seed):
    """Rows of a left-padded batch with different pictures and budgets = each prompt alone."""
    x = exported(seed)
    recipe = Recipe().replace(
        tokens__policy="overlap", tokens__prune_layer=1, tokens__voters="text", neurons__policy="coreinfer"
    )
    backend = x.backend(recipe)
    requests = [request(x, seed, ((3, 4),)), request(x, seed + 50, ((2, 2), (1, 3))), request(x, seed + 70, ((2, 5),))]
    longest = max(r.tokens for r in requests)
    single, feeds = [], []
    for r, share in zip(requests, (0.3, 0.6, 0.5), strict=True):
        f = prefill_feeds(r) | sparse_feeds(r, recipe, share)
        single.append(arrays(prefill(backend, f)))
        pad = longest - r.tokens
        feeds.append(
            {
                "inputs_embeds": np.pad(f["inputs_embeds"], ((0, 0), (pad, 0), (0, 0))),
                "position_ids": np.pad(f["position_ids"], ((0, 0), (0, 0), (pad, 0))),
                "attention_mask": np.pad(f["attention_mask"], ((0, 0), (pad, 0))),
                "image_mask": np.pad(f["image_mask"], ((0, 0), (pad, 0))),
                "image_keep": f["image_keep"],
            }
        )
    batch = {n: np.concatenate([f[n] for f in feeds], 1 if n == "position_ids" else 0) for n in feeds[0]}
    out = arrays(prefill(backend, batch))
    for b, (alone, r) in enumerate(zip(single, requests, strict=True)):
        real = out["kept_mask"][b] == 1
        np.testing.assert_array_equal(out["kept_tokens"][b][real], alone["kept_tokens"][0] + longest - r.tokens)
        agrees("export", out["logits"][b], alone["logits"][0])
        np.testing.assert_array_equal(out["core_scores"][:, b], alone["core_scores"][:, 0])
        agrees("export", out["present.0.key"][b][:, real], alone["present.0.key"][0])


def test_a_missing_site_is_an_error_that_names_the_layer(exported):
    x = exported(1)
    with pytest.raises(SurgeryError, match=r"FFN not found in layer 1: .*gate_proj"):
        ffn_sites(Edit(_renamed(x, "layers.1.mlp.gate_proj.weight")), family, x.shape.layers)
    with pytest.raises(SurgeryError, match=r"attention not found in layer 0: .*o_proj"):
        attention_sites(Edit(_renamed(x, "layers.0.self_attn.o_proj.weight")), family, x.shape.layers)


def _renamed(x, part):
    model = copy(x.dense["prefill"])
    for holder in (model.graph.initializer, model.graph.node):
        for item in holder:
            if isinstance(item, onnx.TensorProto):
                item.name = item.name.replace(part, "elsewhere")
            else:
                item.input[:] = [i.replace(part, "elsewhere") for i in item.input]
    return model


def test_sites_are_found_whatever_the_order_of_the_nodes(exported):
    x = exported(5)
    model = copy(x.dense["prefill"])
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    for i, site in enumerate(ffn_sites(Edit(model), family, x.shape.layers)):
        assert f"layers.{i}." in site.w_gate.name and f"layers.{i}." in site.w_down_t.name


def test_every_sparse_graph_passes_the_checker_and_holds_one_core_node_per_layer(exported):
    x = exported(5)
    for recipe in (Recipe(), Recipe().replace(tokens__cache="index"), Recipe().replace(tokens__budget="knee")):
        graphs = x.graphs(recipe.replace(tokens__prune_layer=1))
        for name in ("prefill", "decode"):
            onnx.save(graphs[name], x.folder / f"{name}.onnx")  # beside the weight file, as in a bundle
            onnx.checker.check_model(x.folder / f"{name}.onnx")
            ops = [n.op_type for n in graphs[name].graph.node if n.domain == "cm_export"]
            assert ops.count("CoreFFN") == ops.count("CoreAttention") == x.shape.layers
            read = {i for n in graphs[name].graph.node for i in n.input}
            assert {i.name for i in graphs[name].graph.input} <= read, "no graph input is ignored"


def test_a_prune_layer_beyond_the_model_is_refused(exported):
    x = exported(1)
    with pytest.raises(InputError, match="leaves no layer"):
        pipeline.check_recipe(Recipe().replace(tokens__prune_layer=x.shape.layers), x.shape)


def test_knee_budget_keeps_within_its_clamp(exported):
    x = exported(5)
    recipe = Recipe().replace(
        tokens__budget="knee", tokens__prune_layer=1, tokens__min_share=0.25, tokens__max_share=0.5
    )
    req = request(x, 5)
    out = arrays(prefill(x.backend(recipe), prefill_feeds(req) | sparse_feeds(req, recipe)))
    kept = int(req.is_image[0, out["kept_tokens"][0]].sum())
    assert round(0.25 * req.image_tokens) <= kept <= round(0.5 * req.image_tokens)
