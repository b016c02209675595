"""A token that is read alone and one that is read among others have equal logits: what the guard checks is what decode says."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from random_models import request

from cm_export.backends.onnxruntime.grouped import group_attention
from cm_export.base.onnx_text import DOMAIN
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row
from cm_export.host.request import prefill_feeds
from cm_export.plugins.core_attention.op import function
from cm_export.recipe.recipe import Recipe

PAST, ROOM, WIDTH, SCALE = 37, 48, 24, 0.3


def attention(heads, kv_heads, core):
    """Attention over the memory of a cache, into which the new rows are written already."""
    called = f"{DOMAIN}.CoreAttention" if core else "Attention"
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 23, "{DOMAIN}": 1, "com.microsoft": 1]>
        g (float[1,{heads},N,{WIDTH}] q, float[1,1,N,{ROOM}] mask, float[1,{kv_heads},{ROOM},{WIDTH}] past)
        => (float[1,{heads},N,{WIDTH}] y) {{
            y = {called} <scale = {SCALE}> (q, past, past, mask)
        }}""")
    model.graph.input[2].name = "past.0.key"
    model.graph.node[0].input[1:3] = ["past.0.key"] * 2
    if core:
        model.functions.append(function(index=False))
    return model


def run(model, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)[0]


def feeds(heads, kv_heads, new):
    rng = np.random.default_rng(0)
    shapes = {"q": (1, heads, new, WIDTH), "past.0.key": (1, kv_heads, ROOM, WIDTH)}
    out = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    seen = np.arange(ROOM) <= PAST + np.arange(new)[:, None]
    return out | {"mask": np.where(seen, 0, np.finfo(np.float32).min).astype(np.float32)[None, None]}


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (9, 3), (3, 3)])
def test_grouped_attention_is_attention_and_gives_each_token_the_same_numbers_alone_and_among_others(
    heads, kv_heads, core
):
    model, together = attention(heads, kv_heads, core), feeds(heads, kv_heads, 7)
    exact = run(model, together)
    group_attention(model, heads)
    found = run(model, together)
    np.testing.assert_allclose(found, exact, atol=2e-6)
    for i in range(7):
        alone = together | {n: together[n][:, :, i : i + 1] for n in ("q", "mask")}
        np.testing.assert_array_equal(run(model, alone), found[:, :, i : i + 1])


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_model_says_the_same_of_a_token_read_alone_and_among_others(exported, seed):
    """Of float32 weights the products differ in the last bits, too; attention alone must not."""
    x = exported(seed)
    backend, asked = x.backend(Recipe()), request(x, seed)
    found, cache = backend.prefill(prefill_feeds(asked), "prefill_dense")
    core = CoreSet.whole(x.shape)
    several, alone = (Row(asked, core, cache, found["logits"][0], graph="decode_dense") for _ in range(2))
    Reader(backend).read([several], [[3, 4, 5]])
    for token in (3, 4, 5):
        Reader(backend).read([alone], [[token]])
    np.testing.assert_allclose(alone.last, several.last, atol=1e-5)
