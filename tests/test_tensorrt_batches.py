"""Several requests on one engine: each gives what it gives alone, memory comes back, and mixed-up rows are noticed."""

import gc
from weakref import WeakSet

import numpy as np
import pytest
from conftest import wide
from test_tensorrt_sessions import FP32, IMAGES, MOST, SOME, VERSIONS, engines_of, prefilled_of
from tolerances import agrees

from cm_export.backends.tensorrt import cache as caching
from cm_export.backends.tensorrt import cuda as memory_of_cuda
from cm_export.backends.tensorrt import decode as decoding
from cm_export.base.errors import BundleError, InputError
from cm_export.deploy.jetson import memory
from cm_export.host.decode import Batch, decode, greedy, recorded
from cm_export.host.images import open_image

WORDS = "what shape is in the image?"
# pictures, words, how many tokens, budget
ASKED = {
    "two pictures": (2, WORDS, 9, {}),
    "no picture": (0, "describe", 6, {}),
    "long": (0, " ".join([WORDS] * 9), 10, {}),
    "few neurons": (1, WORDS, 7, {"neuron_share": 0.3}),
    "few neurons and tokens": (2, "is there a circle?", 5, {"neuron_share": 0.3, "token_share": 0.2}),
    "dense": (1, "describe", 5, {"dense": True}),
}
COPIED = ["10.3.0", *map(wide, SOME[1:])]  # of copied caches there are two sides, so the most memory
LEAVES, JOINS = "long", "few neurons"


def rows_of(model, names=ASKED):
    """name -> its row at the beginning of an answer, which no word ends; and the logits that it will have seen."""
    rows, logits = {}, {name: [] for name in names}
    for name in names:
        pictures, words, limit, budget = ASKED[name]
        prefilled = prefilled_of(model, IMAGES[:pictures], words, **budget)
        rows[name] = prefilled.row(choose=recorded(greedy(), logits[name]), limit=limit)
    return rows, logits


def alone(model, names=ASKED):
    """Tokens and logits [T,V] of each, one after the other."""
    rows, logits = rows_of(model, names)
    for row in rows.values():
        list(decode(model.backend, [row]))
    return {n: row.ids for n, row in rows.items()}, {n: np.stack(found) for n, found in logits.items()}


_known: dict = {}


def known(at):
    """`alone`, of a model of its own, once for all tests of these engines."""
    if at.bundle not in _known:
        _known[at.bundle] = alone(engines_of(at))
    return _known[at.bundle]


def of(names, found):
    """Of tokens and logits those of some requests."""
    return tuple({name: values[name] for name in names} for values in found)


def together(model, names=ASKED, lets_go=False):
    """The same at once: one joins after two steps, one leaves after four.

    `lets_go`: of what has ended, as a server does; its cache holds the memory of all that it stepped with.
    """
    rows, logits = rows_of(model, names)
    batch = Batch(model.backend, [row for name, row in rows.items() if name != JOINS])
    for step in range(30):
        if step == 2 and JOINS in rows:
            batch.add(rows[JOINS])
        if step == 4 and LEAVES in rows:
            batch.remove(rows[LEAVES])
        batch.choose()
        for name, row in rows.items():
            if lets_go and (row.ended or (name == LEAVES and row not in batch.rows)):
                row.cache = None
        if batch.rows:
            batch.read()
    assert not batch.rows
    return {n: row.ids for n, row in rows.items()}, {n: np.stack(found) for n, found in logits.items()}


@pytest.fixture
def watched(monkeypatch):
    """(graph, batch) of every step of an engine."""
    steps, real = [], decoding.Decoder.read

    def read(self, tokens, cache):
        steps.append((self._session.graph, len(tokens.embeds)))
        return real(self, tokens, cache)

    monkeypatch.setattr(decoding.Decoder, "read", read)
    return steps


def same(found, expected):
    """Tokens as far as each went, and their logits."""
    for name, ids in expected[0].items():
        ours, logits = found[0][name], found[1][name]
        assert ours == ids[: len(ours)] and len(ours) == (4 if name == LEAVES else len(ids)), name
        agrees("export", logits, expected[1][name][: len(logits)])


@pytest.mark.parametrize(
    ("version", "cache"),
    [
        *((v, "cut") if v in SOME else wide(v, "cut") for v in VERSIONS),
        ("10.3.0", "index"),
        *(wide(version, "index") for version in SOME[1:]),
    ],
)
def test_requests_that_decode_together_give_what_each_gives_alone(sit, watched, version, cache):
    """Unequal prompts and budgets, one that joins late and one that leaves early; as many in a call as may share one."""
    at = sit(version, cache, **FP32)
    model = engines_of(at)
    expected = _known[at.bundle] = alone(model)
    assert {batch for _, batch in watched} == {1}
    watched.clear()
    same(together(model), expected)
    assert {batch for graph, batch in watched if graph == "decode"} >= {2, 3}
    assert {batch for graph, batch in watched if graph == "decode_dense"} == {1}
    assert len(watched) < sum(map(len, expected[0].values())) * 0.7


def test_in_16_bit_the_tokens_are_the_same_too(sit):
    at = sit("10.3.0", engine__max_batch=MOST)
    expected, found = known(at)[0], together(engines_of(at))[0]
    assert {n: ids[: len(found[n])] for n, ids in expected.items()} == found


@pytest.mark.parametrize("version", SOME)
def test_more_requests_than_an_engine_takes_are_split(sit, watched, version):
    model = engines_of(sit(version, **FP32))
    prefilled = [prefilled_of(model, IMAGES[: i % 3], WORDS if i % 2 else "describe") for i in range(6)]
    expected = []
    for one in prefilled:
        expected.append([token for _, token in decode(model.backend, [one.row(limit=6)])])
    watched.clear()
    rows = [one.row(limit=6) for one in prefilled]
    list(decode(model.backend, rows))
    assert [row.ids for row in rows] == expected
    assert [batch for _, batch in watched] == [4, 2] * 5


def test_an_engine_built_for_one_request_takes_them_in_turn(sit, watched):
    at = sit("10.16.1.11")
    same(together(engines_of(at)), known(at))
    assert {batch for _, batch in watched} == {1}


def test_profiles_take_max_batch_requests_in_decode_and_one_elsewhere(sit):
    at = sit("10.16.1.11", **FP32)
    graphs = engines_of(at).bundle.manifest["engines"]["graphs"]
    for name, graph in graphs.items():
        batches = {
            tuple(shape[v["shape"].index("batch")] for shape in graph["profile"][v["name"]])
            for v in graph["inputs"]
            if "batch" in v["shape"]
        }
        assert batches == (
            {(1, MOST, MOST)} if name.startswith("decode") else {(1, 1, 1)} if name != "vision" else set()
        )


# ---------------------------------------------------------------------------------------------------- two answers to one prompt
@pytest.mark.parametrize("version", SOME)
def test_two_answers_to_one_prompt_keep_their_own_rows(sit, version):
    """Both begin from the same cache; read in turn and in calls of their own, neither sees the other's tokens."""
    model = engines_of(sit(version, **FP32))
    prefilled, tokens = prefilled_of(model), ([11, 12, 5, 7], [8, 9, 10, 6])
    expected = []
    for ids in tokens:
        row = prefilled.row()
        expected.append([])
        for token in ids:
            model.read([row], [[token]])
            expected[-1].append(row.last)
    rows = [prefilled.row(), prefilled.row()]
    found = [[], []]
    for step in range(len(tokens[0])):
        for i, row in enumerate(rows):
            model.read([row], [[tokens[i][step]]])
            found[i].append(row.last)
    agrees("export", np.array(found), np.array(expected))
    back = rows[0]
    back.back_to(2)
    model.read([back], [[tokens[0][2]]])
    agrees("export", back.last, expected[0][2])


# ---------------------------------------------------------------------------------------------------- memory
def held(at):
    """Bytes of the device that are allocated now."""
    return (1 << 32) - at.cuda._left


@pytest.mark.parametrize(
    ("size", "version"),
    [
        (1, "10.3.0"),
        (MOST, "10.16.1.11"),
        *(wide(MOST, v) for v in ("10.3.0", "rtx-1.7.1")),
        *(wide(1, v) for v in SOME[1:]),
    ],
)
def test_twenty_requests_take_no_more_memory_than_the_first_two(sit, version, size):
    """One after the other, or in batches of four; prompts and budgets of unequal sizes in turn."""
    at = sit(version, **FP32)
    model = engines_of(at)
    names = ("two pictures", "long", "few neurons", "few neurons and tokens")

    def answer(turn):
        rows, _ = rows_of(model, [names[turn % 2]] if size == 1 else names)
        list(decode(model.backend, list(rows.values())))

    for turn in range(2):
        answer(turn)
    bytes_held, asked_for = held(at), at.cuda._allocated
    for turn in range(2, 20 if size == 1 else 5):
        answer(turn)
        assert held(at) <= bytes_held
    if size == 1:
        assert at.cuda._allocated == asked_for, "and none that was freed again"


@pytest.mark.parametrize("version", COPIED)
def test_caches_take_no_more_than_pack_predicts(sit, monkeypatch, version):
    at = sit(version, engine__max_batch=MOST)
    model = engines_of(at)
    buffers, most, real = WeakSet(), [0], caching.CacheMemory.take

    def take(self, places):
        loan = real(self, places)
        buffers.add(loan._buffer)
        most.append(sum(b.size for b in buffers))
        return loan

    monkeypatch.setattr(caching.CacheMemory, "take", take)
    together(model, [n for n in ASKED if n not in ("dense", "few neurons and tokens")], lets_go=True)
    engine, kv = model.bundle.recipe.engine, model.bundle.manifest["engines"]["kv"]
    parts = memory.predict({"decode": 0}, model.bundle, engine, kv, True, 0).parts
    one = memory.predict({"decode": 0}, model.bundle, memory.replace(engine, max_batch=1), kv, True, 0).parts
    assert MOST * one["cache"] < max(most) <= parts["cache"] + parts["cache, regrouped"]
    assert parts["cache"] == MOST * one["cache"] and "cache, regrouped" not in one


def test_the_last_to_leave_costs_no_copy_and_one_that_joins_costs_its_group(sit):
    at = sit("10.16.1.11", **FP32)
    model = engines_of(at)
    rows = [prefilled_of(model, IMAGES[: i % 3]).row(limit=9) for i in range(4)]
    batch = Batch(model.backend, rows[:3])

    def copies():
        at.cuda._log[:] = []
        batch.choose()
        batch.read()
        return at.cuda._log.count("copy rows") / len(model.backend.memory.shapes)

    assert copies() == 3 and copies() == 0
    batch.remove(rows[2])
    assert copies() == 0
    batch.add(rows[3])
    assert copies() == 3
    batch.remove(rows[0])
    assert copies() == 0
    batch.add(rows[0])
    batch.remove(rows[1])
    assert copies() == 2


# ---------------------------------------------------------------------------------------------------- what ends or goes halfway
@pytest.mark.parametrize("version", SOME)
def test_a_row_goes_on_when_everything_else_of_its_request_is_gone(sit, version):
    at = sit(version, **FP32)
    model, expected = engines_of(at), known(at)[0]["few neurons"]
    rows, _ = rows_of(model, ["few neurons"])
    row = rows.pop("few neurons")
    batch = Batch(model.backend, [row])
    while batch.rows:
        batch.choose()
        gc.collect()
        if batch.rows:
            batch.read()
        if len(row.ids) == 3:  # its core set lives in the row alone, and another takes its place
            row.core = type(row.core)(row.core.neurons.copy(), row.core.counts, row.core.ffn)
    assert row.ids == expected


@pytest.mark.parametrize("version", COPIED)
def test_engines_may_be_dropped_while_a_request_is_answered(sit, version):
    """A decoder keeps its engine, a cache its memory; whoever comes later loads the engine again."""
    at = sit(version, **FP32)
    model = engines_of(at)
    names = ["two pictures", "no picture", "long"]
    expected = of(names, known(at))[0]
    rows, _ = rows_of(model, names)
    batch = Batch(model.backend, list(rows.values())[:2])
    for step in range(20):
        if step in (2, 5):
            model.backend.drop("vision", "prefill", "prefill_dense", "decode", "decode_dense")
        if step == 4:
            batch.add(rows["long"])
        batch.choose()
        if batch.rows:
            batch.read()
    assert {n: row.ids for n, row in rows.items()} == expected
    before = held(at)
    model.backend.drop("vision", "prefill", "prefill_dense", "decode", "decode_dense")
    assert held(at) <= before
    assert alone(model, names)[0] == expected


@pytest.mark.parametrize("version", SOME)
def test_a_dropped_engine_keeps_its_scratch_when_a_larger_one_is_loaded(sit, version):
    at = sit(version, **FP32)
    expected, model = known(at)[0]["no picture"], engines_of(at)
    rows, _ = rows_of(model, ["no picture"])
    answer = decode(model.backend, list(rows.values()))
    found = [token for _, (_, token) in zip(range(3), answer, strict=False)]
    model.backend.drop("decode")
    model.see([open_image(IMAGES[0])])  # the tower's engine needs more scratch memory than those before it
    assert model.backend._scratch_size > 4096
    assert found + [token for _, token in answer] == expected


def given_up(model):
    """Every request alone, left in the middle of its answer and after a read that is refused; then two together."""
    for name in ASKED:
        rows, _ = rows_of(model, [name])
        answer = decode(model.backend, list(rows.values()))
        for _ in range(3):
            next(answer)
        with pytest.raises(InputError, match="the cache of these engines has"):
            model.read([rows[name]], [[5] * 300])
    rows, _ = rows_of(model, ["no picture", "two pictures"])
    batch = Batch(model.backend, list(rows.values()))
    batch.choose()
    batch.read()


@pytest.mark.parametrize("version", COPIED)
def test_requests_that_are_given_up_halfway_leave_nothing(sit, version):
    at = sit(version, **FP32)
    model, expected = engines_of(at), known(at)[0]
    together(model)
    given_up(model)
    gc.collect()
    bytes_held = held(at)
    for _ in range(2):
        given_up(model)
        gc.collect()
        assert held(at) <= bytes_held
    assert alone(model)[0] == expected
    given_up(model)  # what was read last is kept for the next: only the same work leaves the same memory
    gc.collect()
    assert held(at) <= bytes_held


# ---------------------------------------------------------------------------------------------------- planted faults
def one_memory_for_all(patch):
    real, kept = caching.CacheMemory.take, {}

    def take(self, places):
        if self.sets == 1:
            return kept.setdefault("one", real(self, MOST))
        kept.setdefault("turn", [0])[0] += 1
        return kept.setdefault(kept["turn"][0] % 2, real(self, MOST))

    patch.setattr(caching.CacheMemory, "take", take)


def loans_come_back_at_once(patch):
    real = memory_of_cuda.Pool.take

    def take(self, size, cleared=False):
        loan = real(self, size, cleared)
        if loan._buffer not in self._spare:
            self._spare.append(loan._buffer)
        return loan

    patch.setattr(memory_of_cuda.Pool, "take", take)


def every_row_is_the_first(patch):
    real = caching.Owned.address
    patch.setattr(caching.Owned, "address", lambda self, which, past, place: real(self, which, past, 0))


def _changed(name, change):
    real = decoding.Decoder._changing

    def plant(patch):
        def changing(self, *args):
            out = real(self, *args)
            return out | {name: change(out[name])}

        patch.setattr(decoding.Decoder, "_changing", changing)

    return plant


def _core(name, change):
    real = decoding.core_inputs

    def plant(patch):
        def turned(backend, session, cores):
            return {n: change(v) if n == name else v for n, v in real(backend, session, cores).items()}

        patch.setattr(decoding, "core_inputs", turned)

    return plant


FAULTS = {
    "two requests share one memory": one_memory_for_all,
    "memory is lent twice": loans_come_back_at_once,
    "every row lies where the first does": every_row_is_the_first,
    "one row to write for all": _changed("write_index", lambda rows: np.full_like(rows, rows[0])),
    "a neighbour's mask": _changed("attention_mask", lambda mask: np.roll(mask, 1, 0)),
    "a neighbour's position": _changed("position_ids", lambda positions: np.roll(positions, 1, 1)),
    "a neighbour's list of rows": _changed("core_tokens", lambda rows: np.roll(rows, 1, 0)),
    "a neighbour's neurons": _core("core_neurons", lambda neurons: np.roll(neurons, 1, 1)),
}


@pytest.mark.parametrize("version", ["10.3.0", wide("10.16.1.11")])
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_that_are_mixed_up_are_noticed(sit, monkeypatch, version, fault):
    at = sit(version, "index", **FP32)
    names = ["two pictures", "no picture", "long"]
    expected = of(names, known(at))
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, BundleError)):  # some are refused by the engine itself
        same(together(engines_of(at), names), expected)


@pytest.mark.parametrize("version", SOME)
def test_a_row_written_over_another_answers_row_is_noticed(sit, monkeypatch, version):
    monkeypatch.setattr(caching.StaticCache, "writable", lambda self: self)
    with pytest.raises(AssertionError):
        test_two_answers_to_one_prompt_keep_their_own_rows(sit, version)
