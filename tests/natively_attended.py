"""A family's decode graphs with CachedAttention of the native library: every layer has it, and says the same."""

import numpy as np
import pytest
from random_models import request_of
from tolerances import agrees

from cm_export.backends.onnxruntime.cached_attention import OP
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row
from cm_export.host.request import prefill_feeds
from cm_export.plugins.cpu import build, library
from cm_export.recipe.recipe import Recipe


def asked(x, words):
    """A prompt of random words."""
    ids = np.random.default_rng(words).integers(3, 20, words)
    return request_of(x, ids, np.empty((0, 3), int), None)


def says_the_same(x, recipe=None) -> None:
    """Of several tokens, of one, and of two requests of unlike length together; weights are float32 as ever.

    With a recipe whose cache stays whole, decode reads listed rows of it.
    """
    if build.compiler() is None:
        pytest.skip("no C++ compiler: the CPU ops cannot be built here")
    recipe, graphs = recipe or Recipe().for_model(x.shape), ("decode_dense", "decode")
    lists = [np.array([0, 2, 4], np.int32), np.array([1, 2, 5, 7], np.int32)]
    backend = x.backend(recipe)
    requests = [asked(x, 5), asked(x, 9)]
    begun = [backend.prefill(prefill_feeds(r), "prefill_dense") for r in requests]
    core = CoreSet.whole(x.shape)

    def said(graph):
        rows = [Row(r, core, c, f["logits"][0], graph=graph) for r, (f, c) in zip(requests, begun, strict=True)]
        for row, listed in zip(rows, lists, strict=True):
            row.listed = listed if graph == "decode" and recipe.tokens.cache == "index" else None
        reader, out = Reader(backend), []
        for who, tokens in ((0, [3, 4, 5]), (0, [6]), (None, [7]), (None, [8, 3])):
            some = rows if who is None else [rows[who]]
            reader.read(some, [tokens] * len(some))
            out += [row.logits.reshape(-1, x.shape.vocab) for row in some]
        return np.concatenate(out)

    plain = [said(graph) for graph in graphs]
    packed = backend._packed
    backend._sessions.clear()
    backend.native = library.built()
    backend._packed = lambda model, name: (packed(model, name)[0], {"one": np.zeros(1, np.float32)})
    for graph, expected in zip(graphs, plain, strict=True):
        model, _ = backend._prepared(backend._graph(graph), (graph, True, False, True))
        ops = [n.op_type for n in model.graph.node]
        assert (ops.count(OP), ops.count("GroupedAttention")) == (x.shape.layers, 0)
        agrees("export", said(graph), expected)
