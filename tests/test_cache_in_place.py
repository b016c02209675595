"""A step writes into the memory of its cache and copies nothing; whoever else reads on from there keeps what it had."""

import numpy as np
import onnx
import pytest
from natively_attended import says_the_same
from random_models import request
from tolerances import agrees

from cm_export.backends.onnxruntime import cache as caches
from cm_export.backends.onnxruntime.cached_attention import OP, attend_natively
from cm_export.backends.onnxruntime.in_place import write_in_place
from cm_export.base.errors import SurgeryError
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Reader, Row
from cm_export.host.request import prefill_feeds
from cm_export.recipe.recipe import Recipe


@pytest.fixture(scope="module")
def begun(exported):
    """A backend, and what makes rows at the beginning of an answer, each with a cache of its own."""
    x = exported(1)
    backend, asked = x.backend(Recipe().replace(tokens__prune_layer=1)), request(x, 1)
    core = CoreSet.whole(x.shape)

    def row(cache=None):
        found, own = backend.prefill(prefill_feeds(asked), "prefill_dense")
        return Row(asked, core, cache or own, found["logits"][0], graph="decode_dense")

    return x, backend, row


def said(backend, row, tokens):
    """Logits after each of these tokens, read one by one."""
    out, reader = [], Reader(backend)
    for token in tokens:
        reader.read([row], [[token]])
        out.append(row.last)
    return np.stack(out)


def test_steps_stay_in_one_memory_until_it_is_full(begun, monkeypatch):
    _, backend, row = begun
    monkeypatch.setattr(caches, "_LEAST_ROOM", 8)
    one, memories = row(), []
    room = one.cache.memory.capacity - one.cache.width
    for _ in range(room + 1):
        said(backend, one, [3])
        memories.append(one.cache.memory)
    assert len({id(m) for m in memories[:room]}) == 1 and memories[room] is not memories[0]


def test_numbers_do_not_change_where_the_memory_moves(begun, monkeypatch):
    _, backend, row = begun
    plenty = said(backend, row(), [3, 4, 5] * 8)
    monkeypatch.setattr(caches, "_LEAST_ROOM", 0)
    np.testing.assert_array_equal(said(backend, row(), [3, 4, 5] * 8), plenty)


def test_two_that_go_on_from_one_place_do_not_disturb_each_other(begun):
    _, backend, row = begun
    first = row()
    second = row(first.cache)
    expected = said(backend, row(), [3, 4, 5]), said(backend, row(), [6, 7, 8])
    found = [], []
    for a, b in ((3, 6), (4, 7), (5, 8)):
        found[0].append(said(backend, first, [a])[0])
        found[1].append(said(backend, second, [b])[0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.stack(one), other)


def test_forgetting_rows_copies_nothing_and_leaves_what_was_there(begun):
    _, backend, row = begun
    one = row()
    expected = said(backend, row(), [3, 4, 9])
    said(backend, one, [3, 4, 5, 6])
    memory = one.cache.memory
    one.back_to(2)
    assert one.cache.memory is memory
    np.testing.assert_array_equal(said(backend, one, [9])[0], expected[2])
    assert one.cache.memory is memory


def test_a_draft_that_is_dropped_costs_no_copy(begun):
    """The guard's sparse row writes behind the dense one; once it is gone, the dense one writes there."""
    _, backend, row = begun
    dense = row()
    memory = dense.cache.memory

    def draft():
        sparse = Row(dense.request, dense.core, dense.cache, dense.last, graph="decode_dense")
        sparse.follow(dense)
        said(backend, sparse, [5, 6, 7])

    draft()
    said(backend, dense, [3, 4])
    assert dense.cache.memory is memory


def test_rows_behind_the_last_one_are_never_seen(begun):
    _, backend, row = begun
    clean, dirty = row(), row()
    for held in dirty.cache.memory.held.values():
        held.array[:, :, dirty.cache.width :] = 1e4
    np.testing.assert_array_equal(said(backend, clean, [3, 4]), said(backend, dirty, [3, 4]))


def test_a_graph_whose_cache_nothing_is_joined_to_is_refused(begun):
    x, _, _ = begun
    graph = x.graphs(Recipe().replace(tokens__prune_layer=1))["decode_dense"]
    joined = next(n for n in graph.graph.node if n.op_type == "Concat" and n.input[0] == "past.0.value")
    joined.op_type = "Sum"
    with pytest.raises(SurgeryError, match=r"past\.0\.value"):
        write_in_place(graph)


def test_the_cache_that_comes_back_holds_what_a_copying_graph_gives(begun):
    _, backend, row = begun
    one = row()
    before = {n: a.copy() for n, a in one.cache.arrays().items()}
    said(backend, one, [3])
    session = backend.session("decode_dense")
    feeds = {
        "inputs_embeds": one.request.embedded([3])[None],
        "position_ids": one.request.positions_after(0, 1)[:, None],
    }
    feeds |= {"attention_mask": np.ones((1, one.request.tokens + 1), np.int64), **before}
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))
    agrees("same numbers", one.last, found["logits"][0, -1])
    for name, array in one.cache.arrays().items():
        agrees("same numbers", array, found[name.replace("past", "present", 1)])


@pytest.mark.parametrize("cache", ["cut", "index"])
def test_attention_of_the_native_library_says_the_same(exported, cache):
    says_the_same(exported(1), Recipe().replace(tokens__prune_layer=1, tokens__cache=cache))


def test_a_layer_that_looks_otherwise_stays_as_it_is(exported):
    """Keys that somebody else reads, a mask of its own, heads that are laid out in another way."""
    x = exported(1)
    for spoil in (_read_keys, _mask, _order):
        graph = x.graphs(Recipe().replace(tokens__prune_layer=1))["decode_dense"]
        write_in_place(graph)
        first = next(n for n in graph.graph.node if n.op_type == "Attention")
        spoil(graph.graph, first)
        attend_natively(graph, x.shape.heads)
        ops = [n.op_type for n in graph.graph.node]
        assert (ops.count("Attention"), ops.count(OP), ops.count("ScatterND")) == (1, x.shape.layers - 1, 2), spoil


def _read_keys(graph, attention):
    graph.node.append(onnx.helper.make_node("Identity", [attention.input[1]], ["keys"]))
    graph.output.append(onnx.helper.make_tensor_value_info("keys", onnx.TensorProto.FLOAT, None))


def _mask(graph, attention):
    attention.input[3] = "another"


def _order(graph, attention):
    next(n for n in graph.node if attention.output[0] in n.input).attribute[0].ints[:] = [0, 2, 3, 1]
