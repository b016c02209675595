"""Laws of token cuts on random models: one cut or two, shared budgets or quotas, cut or indexed, all equal masking."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import SEEDS, numbered, request, request_of
from stepping import Decoder, every_row, gatherer, prefill, step_feeds
from test_surgery import arrays, masked_prefill
from tolerances import agrees

from cm_export.base import by_name
from cm_export.base.core_index import image_token_count
from cm_export.base.errors import InputError
from cm_export.bundle.bundle import Bundle
from cm_export.families import Layout
from cm_export.host.chat import Chat
from cm_export.host.request import prefill_feeds, sparse_feeds
from cm_export.policies.keep import keep_tokens
from cm_export.policies.quota import quota
from cm_export.recipe.recipe import Recipe, check
from cm_export.surgery import choose_tokens as choosing
from cm_export.surgery import cut_tokens as cutting

seeds = pytest.mark.parametrize("seed", SEEDS)
POLICIES = sorted(set(by_name.names_in("cm_export.policies.tokens")) - {"dense"})
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GRIDS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3)


def recipe_of(**tokens):
    values = {"policy": "spread_keys", "prune_layer": 1, "share": 0.3} | tokens
    return Recipe().replace(**{f"tokens__{k}": v for k, v in values.items()})


def run(x, req, recipe, **budget):
    """What the prefill of a recipe gives, its backend, and the backend's own choice of dropped columns."""
    backend = cached_backend(x, recipe)
    return backend, arrays(prefill(backend, prefill_feeds(req) | sparse_feeds(req, recipe, **budget)))


_BACKENDS = {}


def cached_backend(x, recipe):
    key = (x.path, recipe)
    if key not in _BACKENDS:
        _BACKENDS.clear()  # sessions of one recipe at a time
        _BACKENDS[key] = x.backend(recipe)
    return _BACKENDS[key]


def masked(x, req, borders):
    """Dense transformers layers; `borders` = [(layer, dropped columns)]: as keys from that layer on they are not there."""
    gone = {layer: np.concatenate([d for start, d in borders if start <= layer]) for layer, _ in borders}
    return masked_prefill(
        x, req, lambda layer: next((gone[b] for b in sorted(gone, reverse=True) if layer >= b), []), 0
    )


def check_masked(x, req, recipe, out, first=None):
    """Logits and cache of a cut prefill equal dense layers with what was dropped masked; first: kept by the first cut."""
    kept = out["kept_tokens"][0]
    everything = np.arange(req.tokens)
    borders = [(0, np.setdiff1d(everything, first))] if first is not None else []
    borders.append((recipe.tokens.prune_layer, np.setdiff1d(everything if first is None else first, kept)))
    logits, keys = masked(x, req, borders)
    agrees("export", out["logits"], logits)
    for i, (k, v) in enumerate(keys):
        agrees("export", out[f"present.{i}.key"], k.numpy()[:, :, kept])
        agrees("export", out[f"present.{i}.value"], v.numpy()[:, :, kept])


def first_choice(x, req, recipe):
    """Columns that the first cut keeps, by the policy's torch meaning."""
    feeds = sparse_feeds(req, recipe)
    image, real = torch.from_numpy(req.is_image), torch.ones(req.is_image.shape, dtype=torch.long)
    policy = by_name.load("cm_export.policies.tokens", recipe.tokens.first, "")
    wires = {"embeds": torch.from_numpy(req.inputs_embeds), "image_mask": image, "seed": torch.tensor([recipe.seed])}
    score, count = policy.score(**{w: wires[w] for w in policy.WIRES}), torch.from_numpy(feeds["image_keep_first"])
    if recipe.tokens.quota == "each":
        score, count = quota(score, torch.from_numpy(numbered(req.is_image)), count)
    return keep_tokens(score, image, real, count)[0][0].numpy()


# ------------------------------------------------------------------------------------------------ law f
@seeds
@pytest.mark.parametrize("policy", POLICIES)
def test_law_f_a_cut_by_any_policy_is_the_dense_prefill_with_dropped_tokens_masked(exported, seed, policy):
    x, recipe = exported(seed), recipe_of(policy=policy)
    req = request(x, seed)
    _, out = run(x, req, recipe)
    assert out["kept_tokens"].shape[1] < req.tokens
    check_masked(x, req, recipe, out)


@seeds
@pytest.mark.parametrize("first", ["spread", "distinct", "random"])
@pytest.mark.parametrize("quota", ["shared", "each"])
def test_law_f_two_cuts_are_two_maskings(exported, seed, first, quota):
    x, recipe = exported(seed), recipe_of(first=first, first_share=0.6, quota=quota)
    req = request(x, seed, ((3, 4), (2, 2), (1, 5)))
    _, out = run(x, req, recipe)
    chosen = first_choice(x, req, recipe)
    assert set(out["kept_tokens"][0]) < set(chosen) < set(range(req.tokens))
    check_masked(x, req, recipe, out, chosen)


def test_a_second_cut_one_layer_late_is_caught(exported, monkeypatch):
    """The law can fail: layer l still reads tokens that were dropped before it."""
    real = cutting.cut_tokens

    def late(edit, prompt, ffns, keep, kept_mask, layer, kv):
        return real(edit, prompt, ffns, keep, kept_mask, layer + 1 if layer else 0, kv)

    monkeypatch.setattr("cm_export.surgery.pipeline.cut_tokens", late)
    _BACKENDS.clear()
    x, recipe = exported(1), recipe_of(first="spread", first_share=0.6).replace(neurons__policy="dense")
    req = request(x, 1)
    _, out = run(x, req, recipe)
    _BACKENDS.clear()
    with pytest.raises(AssertionError):
        check_masked(x, req, recipe, out, first_choice(x, req, recipe))


@seeds
@pytest.mark.parametrize("first", ["none", "spread"])
@pytest.mark.parametrize("quota", ["shared", "each"])
def test_law_f_decode_over_a_cut_cache_equals_decode_over_listed_rows(exported, seed, first, quota):
    """The same rows of the same cache: once gathered, once read through the list."""
    x = exported(seed)
    recipe = recipe_of(first=first, quota=quota, cache="index", policy="random").replace(neurons__policy="dense")
    req = request(x, seed)
    backend, out = run(x, req, recipe)
    kept = out["kept_tokens"]
    import onnxruntime as ort

    cache = {n: ort.OrtValue.ortvalue_from_numpy(v) for n, v in out.items() if n.startswith("present.")}
    short = {
        n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v.numpy()[:, :, kept[0]])) for n, v in cache.items()
    }
    assert out["present.0.key"].shape[2] == req.tokens > kept.shape[1]
    rows = every_row(gatherer(x.weights, x.family, x.shape.layers))
    indexed, gathered = Decoder(backend, "decode", cache, rows), Decoder(backend, "decode_dense", short, {})
    for step, token in enumerate((9, 8)):
        a = indexed.step(step_feeds(req, token, step, core_tokens=kept))
        b = gathered.step(step_feeds(req, token, step, kept_mask=np.ones_like(kept, np.int64)))
        agrees("same numbers", a, b)


@seeds
def test_an_index_and_a_cut_choose_the_same_tokens_in_the_first_stage(exported, seed):
    """Before the first layer nothing was cut yet, so both see the same embeddings."""
    x = exported(seed)
    req = request(x, seed, ((4, 4),))
    kept = []
    for cache in ("cut", "index"):
        recipe = recipe_of(first="spread", first_share=0.5, share=0.5, policy="random", cache=cache)
        kept.append(run(x, req, recipe)[1]["kept_tokens"][0].tolist())
    assert kept[0] == kept[1] == first_choice(x, req, recipe).tolist()


@pytest.mark.parametrize("policy", ["value", "spread_keys", "random"])
def test_scores_of_all_layers_before_the_cut_are_added(exported, policy):
    """A model of three layers, cut after two: the choice is that of the sum of two torch scores on PyTorch's own q, k, v."""
    x = exported(5)
    assert x.shape.layers == 3
    recipe = recipe_of(policy=policy, prune_layer=2, layers="all")
    req = request(x, 4, ((4, 5),))
    _, out = run(x, req, recipe)
    module = by_name.load("cm_export.policies.tokens", policy, "")
    total, alone = 0, []
    for layer in range(2):
        wires = layer_wires(x, req, layer) | {"seed": torch.tensor([recipe.seed])}
        score = module.score(**{w: wires[w] for w in module.WIRES + module.ATTRIBUTES})
        alone.append(score[0])
        total = total + score
    image = torch.from_numpy(req.is_image)
    count = torch.from_numpy(sparse_feeds(req, recipe)["image_keep"])
    best = keep_tokens(total, image, torch.ones_like(image, dtype=torch.long), count)[0]
    check_masked(x, req, recipe, out)
    assert out["kept_tokens"].tolist() == best.tolist()
    if policy != "random":
        assert not torch.equal(alone[0].argsort(), alone[1].argsort())


def layer_wires(x, req, layer):
    """q, k, v, mask, scale of one layer of stock transformers, and the masks."""
    lm, seen = x.model.model.language_model, {}
    attention = lm.layers[layer].self_attn
    handles = [
        p.register_forward_hook(lambda _m, _i, o, n=n: seen.__setitem__(n, o))
        for n, p in zip("qkv", (attention.q_proj, attention.k_proj, attention.v_proj), strict=True)
    ]
    embeds, n = torch.from_numpy(req.inputs_embeds), req.tokens
    with torch.no_grad():
        lm(inputs_embeds=embeds, position_ids=torch.from_numpy(req.position_ids))
        cos, sin = lm.rotary_emb(embeds, torch.from_numpy(req.position_ids))
    for handle in handles:
        handle.remove()

    def turn(t):
        a, b = t.chunk(2, -1)
        return t * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

    q, k, v = (seen[n].view(1, req.tokens, -1, attention.head_dim).transpose(1, 2) for n in "qkv")
    mask = torch.full((1, 1, n, n), -torch.inf).triu(1)
    wires = {"q": turn(q), "k": turn(k), "v": v, "mask": mask, "scale": attention.head_dim**-0.5}
    return wires | {"vote": torch.ones(1, n), "image_mask": torch.from_numpy(req.is_image)}


# ------------------------------------------------------------------------------------------------ law g
@FEW
@given(grids=GRIDS, seed=st.integers(0, 2**31), share=st.sampled_from([0.01, 0.2, 0.5, 0.9, 1.0]))
@pytest.mark.parametrize("quota", ["shared", "each"])
@pytest.mark.parametrize("first", ["none", "spread"])
def test_law_g_pictures_of_any_sizes_keep_their_share(exported, quota, first, grids, seed, share):
    x = exported(1)
    recipe = recipe_of(quota=quota, first=first, first_share=0.5)
    req = request(x, seed, tuple(grids))
    _, out = run(x, req, recipe, token_share=share)
    kept = out["kept_tokens"][0]
    assert (np.diff(kept) > 0).all() and out["kept_mask"].all()
    assert set(np.flatnonzero(~req.is_image[0])) <= set(kept.tolist())
    sizes, starts = [h * w for h, w in grids], np.flatnonzero(np.diff(req.is_image[0].astype(int), prepend=0) == 1)
    assert req.picture_sizes() == sizes
    of_picture = [int(((kept >= s) & (kept < s + n)).sum()) for s, n in zip(starts, sizes, strict=True)]
    if quota == "each":
        assert of_picture == [image_token_count(share, n) for n in sizes]
    else:
        assert sum(of_picture) == image_token_count(share, sum(sizes))


@seeds
@pytest.mark.parametrize("words", [1, 2, 7])
def test_law_g_prompts_without_a_picture_are_left_alone(exported, seed, words):
    """S = 1 and odd S: nothing to drop, and the sparse prefill is the dense one."""
    x = exported(seed)
    none = np.zeros((0, 3), np.int64)
    req = request_of(x, np.arange(7, 7 + words), none, None)
    for tokens in ({"quota": "shared", "first": "none"}, {"quota": "each", "first": "spread"}):
        backend, out = run(x, req, recipe_of(**tokens))
        dense = arrays(prefill(backend, prefill_feeds(req), "prefill_dense"))
        assert out["kept_tokens"].tolist() == [list(range(words))]
        for name, value in dense.items():
            agrees("export", out[name], value)


@seeds
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("quota", ["shared", "each"])
def test_law_a_every_image_token_is_the_dense_prefill(exported, seed, policy, quota):
    x = exported(seed)
    recipe = recipe_of(policy=policy, quota=quota, first="spread")
    req = request(x, seed)
    backend, out = run(x, req, recipe, token_share=1.0)
    for name, value in arrays(prefill(backend, prefill_feeds(req), "prefill_dense")).items():
        agrees("export", out[name], value)


@seeds
@pytest.mark.parametrize("first", ["none", "spread"])
def test_a_padded_batch_with_quotas_is_cut_row_by_row(exported, seed, first):
    x = exported(seed)
    recipe = recipe_of(quota="each", first=first, policy="value").replace(neurons__policy="coreinfer")
    backend = cached_backend(x, recipe)
    requests = [request(x, seed, ((3, 4),)), request(x, seed + 50, ((2, 2), (1, 3))), request(x, seed + 70, ((2, 5),))]
    longest, most = max(r.tokens for r in requests), 2
    alone, rows = [], []
    for r in requests:
        feeds = prefill_feeds(r) | sparse_feeds(r, recipe)
        alone.append(arrays(prefill(backend, feeds)))
        pad = longest - r.tokens
        row = {n: np.pad(feeds[n], ((0, 0), (pad, 0))) for n in ("attention_mask", "image_mask")}
        row["picture"] = np.pad(feeds["picture"], ((0, 0), (pad, 0)), constant_values=-1)
        row["inputs_embeds"] = np.pad(feeds["inputs_embeds"], ((0, 0), (pad, 0), (0, 0)))
        row["position_ids"] = np.pad(feeds["position_ids"], ((0, 0), (0, 0), (pad, 0)))
        for name in ("image_keep", "image_keep_first"):
            row[name] = np.pad(feeds[name], ((0, 0), (0, most - feeds[name].shape[1])))
        rows.append(row)
    batch = {n: np.concatenate([r[n] for r in rows], 1 if n == "position_ids" else 0) for n in rows[0]}
    out = arrays(prefill(backend, batch))
    for b, (one, r) in enumerate(zip(alone, requests, strict=True)):
        real = out["kept_mask"][b] == 1
        np.testing.assert_array_equal(out["kept_tokens"][b][real], one["kept_tokens"][0] + longest - r.tokens)
        agrees("export", out["logits"][b], one["logits"][0])
        np.testing.assert_array_equal(out["core_scores"][:, b], one["core_scores"][:, 0])


# ------------------------------------------------------------------------------------------------ neurons and recipe
@seeds
@pytest.mark.parametrize("cache", ["cut", "index"])
@pytest.mark.parametrize("first", ["none", "spread"])
def test_neurons_are_counted_on_kept_tokens_or_on_all_that_a_layer_saw(exported, seed, cache, first):
    """Energies of a layer sum to the number of tokens counted in it: griffin gives every token one vote."""
    x = exported(seed)
    req = request(x, seed)
    sums = {}
    for counted in ("kept", "all"):
        recipe = recipe_of(cache=cache, first=first, first_share=0.6).replace(neurons__counted=counted)
        _, out = run(x, req, recipe)
        sums[counted] = out["core_scores"].sum((1, 2))
        kept = out["kept_tokens"].shape[1]
    agrees("export", sums["kept"], np.full(x.shape.layers, kept))
    left = len(first_choice(x, req, recipe)) if first != "none" and cache == "cut" else req.tokens
    seen = [left if i < 1 or cache == "index" else kept for i in range(x.shape.layers)]
    agrees("export", sums["all"], np.array(seen))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"first": "attention"}, "cannot choose before the first layer"),
        ({"first": "sprad"}, "did you mean 'spread'"),
        ({"first": "spread", "policy": "dense"}, "without a token policy"),
        ({"first": "spread", "first_share": 0.1, "share": 0.3}, "first_share = 0.1 is below 0.3"),
        ({"first": "spread", "first_share": 0.0}, "first_share"),
        ({"quota": "eech"}, "did you mean 'each'"),
        ({"layers": "al"}, "did you mean 'all'"),
        ({"knee_confidence": 1.5}, "knee_confidence"),
        ({"prune_layer": 0}, "calibration"),
        ({"prune_layer": -1}, "prune_layer"),
    ],
)
def test_recipes_that_cannot_hold_are_refused(tokens, says):
    with pytest.raises(InputError, match=says):
        recipe_of(**tokens)


def test_neurons_counted_is_checked():
    with pytest.raises(InputError, match="did you mean 'kept'"):
        check(Recipe().replace(neurons__counted="keep"))


def test_the_law_of_the_quota_can_fail(exported, monkeypatch):
    """A quota that pools the pictures is caught."""
    monkeypatch.setattr(choosing.quotas, "QUOTA", _pooling())
    _BACKENDS.clear()
    x, recipe = exported(1), recipe_of(quota="each", policy="random")
    req = request(x, 3, ((4, 5), (1, 2)))
    _, out = run(x, req, recipe)
    _BACKENDS.clear()
    kept = req.is_image[0, out["kept_tokens"][0]].sum()
    assert kept == sparse_feeds(req, recipe)["image_keep"].sum()  # as many as should be, yet
    starts = np.flatnonzero(np.diff(req.is_image[0].astype(int), prepend=0) == 1)
    first = ((out["kept_tokens"][0] >= starts[0]) & (out["kept_tokens"][0] < starts[0] + 20)).sum()
    assert first != image_token_count(0.3, 20), "the first picture took the second one's share"


def _pooling():
    from cm_export.base.onnx_text import function

    return function("""
        Quota (score, picture, image_keep) => (chosen, count) {
            axis_1 = Constant <value_ints = [1]> ()
            zero = Constant <value_int = 0> ()
            count = ReduceSum <keepdims = 0> (image_keep, axis_1)
            first = Equal (picture, zero)
            chosen = Cast <to = 7> (first)
        }""")


def test_pictures_of_a_prompt_are_told_apart_by_their_markers(demo_bundle):
    """Qwen2-VL's template puts <|vision_end|><|vision_start|> between pictures, so their image tokens never touch."""
    chat = Chat(Bundle(demo_bundle))
    ids = chat.encode("what color is the shape?", None, [Layout((1, 1, n)) for n in (3, 1, 5)])
    runs = numbered((ids == chat._bundle.shape.image_token)[None])[0]
    assert np.bincount(runs[runs >= 0]).tolist() == [3, 1, 5]
