"""The decode loop over a made-up model: whoever shares a step, each request writes what the model says to it alone.

The model is a few lines of numpy. Its logits depend on a request's own cache rows and their places, mask, listed rows,
positions, core neurons and graph, so a mix-up of any of them between requests changes an answer. What a request should
write is computed from its whole text at once, without caches, batches or steps (`Asked.logits`).
"""

import weakref
from dataclasses import dataclass

import numpy as np
import pytest

from cm_export.host import decode as loop
from cm_export.host.core_set import CoreSet
from cm_export.host.decode import Batch, Reader, Row, decode, forced, greedy, recorded, sampled, teacher_forced
from cm_export.host.request import Request

VOCAB, HIDDEN, LAYERS, FFN = 17, 6, 2, 8
_rng = np.random.default_rng(7)
EMBEDDING = _rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
NEURONS = _rng.standard_normal((LAYERS, FFN, HIDDEN))
UNEMBED = _rng.standard_normal((HIDDEN, VOCAB))

# ---------------------------------------------------------------- the model


def new_row(embed, position):
    """The cache row [D] of a token: embed [D], position [A]."""
    return np.tanh(embed + 0.3 * np.sin(position @ np.arange(1, len(position) + 1) + np.arange(HIDDEN)))


def logits_of(rows, counted, core):
    """[V] from all cache rows [P,D], of which `counted` [P] bool are read, and the core neurons (None: all)."""
    places = np.flatnonzero(counted)
    state = (rows[places] * np.cos(0.7 * places)[:, None]).sum(0)
    for layer in range(LAYERS):
        ids = range(FFN) if core is None else core.of_layer(layer)
        state = np.sin(2 * state * (1 + NEURONS[layer, list(ids)].sum(0)))
    return (3 * np.sin(4 * state @ UNEMBED)).astype(np.float32)  # so that small changes choose another token


@dataclass(frozen=True)
class Held:
    """The cache: of each request [P_b,D]."""

    rows: tuple

    @property
    def lengths(self):
        return tuple(len(r) for r in self.rows)

    def truncated(self, lengths):
        return Held(tuple(r[:n] for r, n in zip(self.rows, lengths, strict=True)))


class Decoder:
    def __init__(self, backend, graph, cores):
        self.backend, self.graph, self.cores = backend, graph, cores

    def read(self, tokens, cache):
        batch, new, _ = tokens.embeds.shape
        assert batch == len(self.cores) == len(cache.rows) == len(tokens.masks) == tokens.positions.shape[1]
        self.backend.log.append(("read", self.graph, batch, new))
        self.backend.clock += 2
        logits, held = np.zeros((batch, new, VOCAB), np.float32), []
        for b, rows in enumerate(cache.rows):
            assert len(tokens.masks[b]) == len(rows) + new
            added = [new_row(tokens.embeds[b, n], tokens.positions[:, b, n]) for n in range(new)]
            rows = np.concatenate([rows, added])
            counted = tokens.masks[b] > 0
            if tokens.listed is not None:
                counted &= np.isin(np.arange(len(rows)), tokens.listed[b])
            for n in range(new):
                seen = len(rows) - new + n + 1
                core = None if self.graph == "decode_dense" else self.cores[b]
                logits[b, n] = logits_of(rows[:seen], counted[:seen], core)
            held.append(rows)
        return logits, Held(tuple(held))


class Backend:
    """`log`: every call; `clock`: seconds that they took together."""

    def __init__(self, most=99):
        self.most, self.log, self.clock, self._made = most, [], 0.0, []

    def together(self, core):
        return tuple(core.counts.tolist())

    def decoder(self, graph, cores, few_rows=False):
        assert len(cores) <= self.most
        alive = sum(made() is not None for made in self._made)
        self.log.append(("decoder", graph, len(cores), alive))
        self.clock += 5
        out = Decoder(self, graph, cores)
        self._made.append(weakref.ref(out))
        return out

    def regroup(self, rows):
        self.log.append(("regroup", len(rows)))
        self.clock += 1
        return Held(tuple(cache.rows[place] for cache, place in rows))

    def count(self, what):
        return sum(entry[0] == what for entry in self.log)


# ---------------------------------------------------------------- requests, and what the model says to each


@dataclass(frozen=True)
class Asked:
    """A request after its prefill, and its answer computed without the loop."""

    request: Request
    core: CoreSet
    prompt: np.ndarray  # [T,D] cache rows
    graph: str = "decode"
    kept: np.ndarray | None = None
    listed: np.ndarray | None = None

    def logits(self, ids):
        """[V] after the prompt and these tokens of the answer."""
        first = self.request.next_position
        axes = len(self.request.position_ids)
        rows = [new_row(EMBEDDING[t], np.full(axes, first + i)) for i, t in enumerate(ids)]
        counted = np.ones(len(self.prompt), bool) if self.kept is None else self.kept > 0
        if self.listed is not None:
            counted = np.isin(np.arange(len(self.prompt)), self.listed)
        counted = np.concatenate([counted, np.ones(len(ids), bool)])
        core = None if self.graph == "decode_dense" else self.core
        return logits_of(np.concatenate([self.prompt, np.reshape(rows, (-1, HIDDEN))]), counted, core)

    def answer(self, limit):
        """Greedy, no stop id."""
        ids = []
        while len(ids) < limit:
            ids.append(int(self.logits(ids).argmax()))
        return ids

    def row(self, **how):
        fields = {"graph": self.graph, "kept": self.kept, "listed": self.listed} | how
        return Row(self.request, self.core, Held((self.prompt,)), self.logits([]), **fields)


def asked(seed, kind="sparse", neurons=3):
    """A request of any length. kind: sparse, listed (core tokens), cut (a cache of fewer rows, some padding), dense."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(3, 12))
    request = Request(
        picture=np.full((1, tokens), -1, np.int64),
        position_ids=np.arange(tokens)[None, None].repeat(2, 0),
        next_position=int(rng.integers(3, 20)),  # pictures take fewer positions than tokens
        inputs_embeds=np.zeros((1, tokens, HIDDEN), np.float32),
        embedding=EMBEDDING,
    )
    ids = np.stack([np.sort(rng.choice(FFN, neurons, replace=False)) for _ in range(LAYERS)]).astype(np.int32)
    core = CoreSet(ids[:, None], np.full(LAYERS, neurons, np.int64), FFN)
    rows = tokens - 1 if kind == "cut" else tokens
    kept = np.array([1] * (rows - 1) + [0], np.int64) if kind == "cut" else None
    listed = np.arange(0, tokens, 2, dtype=np.int32) if kind == "listed" else None
    graph = "decode_dense" if kind == "dense" else "decode"
    return Asked(request, core, rng.standard_normal((rows, HIDDEN)), graph, kept, listed)


def finish(backend, rows):
    """{row: ids handed out}."""
    out = {row: [] for row in rows}
    for row, token in decode(backend, rows):
        out[row].append(token)
    return out


# ---------------------------------------------------------------- answers


KINDS = ("sparse", "listed", "cut", "dense")


@pytest.mark.parametrize("kind", KINDS)
def test_one_request_writes_what_the_model_says(kind):
    who, backend = asked(1, kind), Backend()
    row = who.row(limit=9)
    assert finish(backend, [row]) == {row: who.answer(9)}
    assert row.ids == who.answer(9) and len(set(row.ids)) > 2, "a model that repeats itself shows nothing"
    assert np.array_equal(row.last, who.logits(row.ids[:-1])), "nothing is read after the last token"
    assert (backend.count("decoder"), backend.count("regroup"), backend.count("read")) == (1, 0, 8)


@pytest.mark.parametrize("seed", range(6))
def test_requests_of_unequal_lengths_and_budgets_write_together_what_each_writes_alone(seed):
    rng = np.random.default_rng(seed)
    many = [asked(100 * seed + i, str(rng.choice(KINDS)), int(rng.integers(2, 4))) for i in range(7)]
    assert len({len(who.prompt) for who in many}) > 2
    limits = rng.integers(1, 10, len(many)).tolist()
    rows = [who.row(limit=limit) for who, limit in zip(many, limits, strict=True)]
    found = finish(Backend(), rows)
    for who, row, limit in zip(many, rows, limits, strict=True):
        assert found[row] == row.ids == who.answer(limit) and row.ended == "limit"


def test_requests_join_and_leave_between_steps():
    a, b, c, d = (asked(seed) for seed in (1, 2, 3, 4))
    rows = [who.row(limit=8) for who in (a, b, c, d)]
    backend = Backend()
    batch, elsewhere = Batch(backend, rows[:2]), Batch(backend)
    for step in range(12):
        if step == 2:
            batch.add(rows[2])
        if step == 4:
            batch.remove(rows[0])  # half way, to go on with others
            elsewhere.add(rows[0])
            elsewhere.add(rows[3])
        for some in (batch, elsewhere):
            some.choose()
            some.read()
    for who, row in zip((a, b, c, d), rows, strict=True):
        assert row.ids == who.answer(8) and row.ended == "limit"
    assert batch.rows == elsewhere.rows == []


def test_a_row_that_leaves_keeps_what_it_has_written_and_ends_nowhere():
    who, other = asked(1), asked(2)
    row, stays = who.row(limit=8), other.row(limit=8)
    batch = Batch(Backend(), [row, stays])
    for _ in range(3):
        batch.choose()
        batch.read()
    batch.remove(row)
    assert row.ids == who.answer(3) and row.ended is None and batch.rows == [stays]


# ---------------------------------------------------------------- where an answer ends


def test_an_answer_of_one_token_reads_nothing():
    who, backend = asked(1), Backend()
    row = who.row(limit=1)
    assert finish(backend, [row]) == {row: who.answer(1)}
    assert row.ended == "limit" and backend.log == [] and row.read == 0


def test_a_limit_of_none_writes_nothing():
    row = asked(1).row(limit=0)
    assert finish(Backend(), [row]) == {row: []} and row.ended == "limit"


def test_a_stop_id_ends_an_answer_and_is_not_handed_out():
    who = asked(3)
    whole = who.answer(9)
    stop = next(i for i in range(1, 9) if whole[i] not in whole[:i])  # the first time that this id comes
    for limit, ids, ended in (
        (stop + 5, whole[:stop], "stop"),
        (stop + 1, whole[:stop], "stop"),  # it would have been the last one that fits
        (stop, whole[:stop], "limit"),  # it would have been the next one: nobody asks
    ):
        row, backend = who.row(limit=limit, choose=greedy(frozenset({whole[stop]}))), Backend()
        assert finish(backend, [row]) == {row: ids} and (row.ids, row.ended) == (ids, ended)
        assert backend.count("read") == (stop if ended == "stop" else stop - 1)


def test_a_stop_id_at_the_first_token_reads_nothing():
    who, backend = asked(3), Backend()
    row = who.row(choose=greedy(frozenset(who.answer(1))))
    assert finish(backend, [row]) == {row: []}
    assert row.ended == "stop" and backend.log == []


def test_rows_that_end_at_different_steps_do_not_disturb_each_other():
    many = [asked(seed) for seed in range(5)]
    stops = [frozenset(who.answer(4 + i)[-1:]) for i, who in enumerate(many)]
    rows = [who.row(limit=9, choose=greedy(stop)) for who, stop in zip(many, stops, strict=True)]
    finish(Backend(), rows)
    for who, row, stop in zip(many, rows, stops, strict=True):
        whole = who.answer(9)
        end = next(i for i, token in enumerate(whole) if token in stop)
        assert (row.ids, row.ended) == (whole[:end], "stop")


# ---------------------------------------------------------------- who chooses


def test_forced_tokens_are_written_and_every_logits_row_is_recorded():
    who, other, logits = asked(1), asked(2, "listed"), []
    row = who.row(choose=recorded(forced([3, 1, 4]), logits), limit=9)
    beside = other.row(limit=9)
    found = finish(Backend(), [beside, row])
    assert found[row] == [3, 1, 4] and row.ended == "stop" and found[beside] == other.answer(9)
    expected = [who.logits(ids) for ids in ([], [3], [3, 1], [3, 1, 4])]
    assert np.array_equal(logits, expected)


def test_at_the_limit_nothing_more_is_recorded():
    who, logits = asked(1), []
    finish(Backend(), [who.row(choose=recorded(greedy(), logits), limit=3)])
    assert len(logits) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [[], [5], [3, 1, 4, 1]])
def test_teacher_forcing_gives_the_logits_before_each_token_and_after_the_last(kind, ids):
    who = asked(6, kind)
    found = teacher_forced(Backend(), who.row(), ids)
    assert np.array_equal(found, [who.logits(ids[:n]) for n in range(len(ids) + 1)])


def test_sampled_tokens_follow_the_generator_and_the_models_distribution():
    who = asked(1)
    rows = [who.row(choose=sampled(np.random.default_rng(seed)), limit=6) for seed in (5, 5, 6)]
    finish(Backend(), rows[:1])
    finish(Backend(), rows[1:])
    assert rows[0].ids == rows[1].ids != rows[2].ids
    rng, ids = np.random.default_rng(5), []
    for _ in range(6):
        logits = who.logits(ids).astype(np.float64)
        p = np.exp(logits - logits.max())
        ids.append(int(rng.choice(VOCAB, p=p / p.sum())))
    assert rows[0].ids == ids
    stopped = who.row(choose=sampled(np.random.default_rng(5), frozenset(ids[2:3])), limit=6)
    finish(Backend(), [stopped])
    assert stopped.ids == ids[: ids.index(ids[2])] and stopped.ended == "stop"


class Refusal(Exception):
    pass


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_chooser_that_raises_leaves_the_other_rows_usable(place):
    """Its own row leaves; the others have lost nothing, and no chooser is asked twice about the same token."""

    def refuse(_, chosen):
        if chosen == 3:
            raise Refusal
        return 1

    many, logits = [asked(seed) for seed in (1, 2)], [[], []]
    rows = [who.row(choose=recorded(greedy(), into), limit=7) for who, into in zip(many, logits, strict=True)]
    bad = asked(3).row(choose=refuse, limit=7)
    batch = Batch(Backend(), [*rows[:place], bad, *rows[place:]])
    handed, raised = {row: [] for row in (*rows, bad)}, 0
    while batch.rows:
        try:
            chosen = batch.choose()
        except Refusal:
            raised += 1
            assert bad not in batch.rows
            continue
        for row, token in chosen:
            handed[row].append(token)
        batch.read()
    assert raised == 1 and bad.ids == handed[bad] == [1, 1, 1] and bad.ended is None
    for who, row, into in zip(many, rows, logits, strict=True):
        assert row.ids == handed[row] == who.answer(7)
        assert np.array_equal(into, [who.logits(row.ids[:n]) for n in range(7)])


def test_a_row_that_leaves_after_another_raised_gets_no_token():
    def refuse(_, chosen):
        raise Refusal

    many = [asked(seed) for seed in (1, 2)]
    stays, leaves = (who.row(limit=1) for who in many)
    batch = Batch(Backend(), [stays, leaves, asked(3).row(choose=refuse)])
    with pytest.raises(Refusal):
        batch.choose()
    batch.remove(leaves)
    assert batch.choose() == [(stays, many[0].answer(1)[0])] and leaves.ids == []


def test_rows_go_on_in_another_loop_after_one_of_them_raised():
    def refuse(_, chosen):
        raise Refusal

    who, backend = asked(1), Backend()
    row, bad = who.row(limit=5), asked(2).row(choose=refuse)
    with pytest.raises(Refusal):
        finish(backend, [row, bad])
    assert finish(backend, [row]) == {row: who.answer(5)}


# ---------------------------------------------------------------- who reads together


def test_dense_and_sparse_rows_take_one_call_each_per_step():
    many = [asked(seed, kind) for seed, kind in enumerate(("sparse", "dense", "sparse", "dense"))]
    backend, rows = Backend(), [who.row(limit=4) for who in many]
    finish(backend, rows)
    assert [row.ids for row in rows] == [who.answer(4) for who in many]
    assert [e[1:] for e in backend.log if e[0] == "read"] == [("decode", 2, 1), ("decode_dense", 2, 1)] * 3
    assert backend.count("decoder") == 2


def test_only_core_sets_that_the_backend_takes_together_share_a_call():
    many = [asked(seed, neurons=neurons) for seed, neurons in enumerate((2, 3, 2))]
    backend, rows = Backend(), [who.row(limit=3) for who in many]
    finish(backend, rows)
    assert [row.ids for row in rows] == [who.answer(3) for who in many]
    assert [e[2] for e in backend.log if e[0] == "read"] == [2, 1] * 2


def test_rows_that_list_what_they_read_do_not_share_a_call_with_rows_that_read_all():
    many = [asked(1, "listed"), asked(2, "sparse"), asked(3, "listed")]
    backend, rows = Backend(), [who.row(limit=3) for who in many]
    finish(backend, rows)
    assert [row.ids for row in rows] == [who.answer(3) for who in many]
    assert [e[2] for e in backend.log if e[0] == "read"] == [2, 1] * 2


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_call_serves_more_requests_than_the_backend_can(most):
    many = [asked(seed) for seed in range(5)]
    backend = Backend(most)
    rows = [who.row(limit=4) for who in many]
    finish(backend, rows)
    assert [row.ids for row in rows] == [who.answer(4) for who in many]
    sizes = [e[2] for e in backend.log if e[0] == "read"]
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[most] * 3
    assert backend.count("decoder") == len(sizes) / 3, "groups stay as they are from step to step"


def test_a_decoder_and_a_cache_stay_while_the_same_rows_read_and_are_made_anew_when_one_leaves_or_joins():
    rows = [asked(seed).row(limit=99) for seed in range(3)]
    backend = Backend()
    batch, last = Batch(backend, rows), asked(3).row(limit=99)

    def calls(steps):
        backend.log.clear()
        for _ in range(steps):
            batch.choose()
            batch.read()
        return [e[:3] for e in backend.log if e[0] != "read"], backend.count("read")

    assert calls(5) == ([("decoder", "decode", 3), ("regroup", 3)], 5)
    batch.remove(rows[1])
    assert calls(5) == ([("decoder", "decode", 2), ("regroup", 2)], 5)
    batch.add(last)
    assert calls(5) == ([("decoder", "decode", 3), ("regroup", 3)], 5)
    batch.rows.reverse()
    assert calls(2) == ([("decoder", "decode", 3), ("regroup", 3)], 2), "rows of neurons lie in the order of the batch"
    for row in batch.rows[1:]:
        batch.remove(row)
    assert calls(3) == ([("decoder", "decode", 1), ("regroup", 1)], 3)


def test_a_decoder_that_is_not_used_any_more_is_freed_before_the_next_one_is_made():
    rows = [asked(seed).row(limit=2 + seed) for seed in range(4)]
    backend = Backend()
    finish(backend, rows)
    assert [e[2:] for e in backend.log if e[0] == "decoder"] == [(4, 0), (3, 0), (2, 0), (1, 0)]


def test_rows_of_the_same_core_set_read_on_with_the_decoder_that_is_there():
    who, backend = asked(1), Backend()
    reader = Reader(backend)
    for tokens in ([3], [1], [4, 1, 5]):
        row = who.row()
        reader.read([row], [tokens])
        assert np.array_equal(row.last, who.logits(tokens))
    assert backend.count("decoder") == 1


def test_gathering_is_timed_apart_from_steps(monkeypatch):
    """A new decoder takes 5 s, a regrouped cache 1, a read 2."""
    backend, spent = Backend(), []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: backend.clock)
    rows = [asked(1).row(limit=3), asked(2).row(limit=5)]
    for _ in decode(backend, rows, spent.append):
        pass
    assert [(s.gather, s.step) for s in spent] == [(5, 3), (0, 2), (5, 3), (0, 2)]


# ---------------------------------------------------------------- reading several tokens, and going back


def test_several_tokens_are_read_at_once_with_logits_after_each():
    many = [asked(1), asked(2), asked(3)]
    rows, tokens = [who.row() for who in many], ([3, 1, 4], [1, 5, 9], [2])
    Reader(Backend()).read(rows, tokens)
    for who, row, ids in zip(many[:2], rows, tokens, strict=False):
        assert np.array_equal(row.logits, [who.logits(ids[: n + 1]) for n in range(3)])
        assert np.array_equal(row.last, who.logits(ids)) and row.read == 3
    assert np.array_equal(rows[2].logits, many[2].logits([2])) and rows[2].logits.ndim == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_goes_back_to_an_earlier_token(kind):
    who = asked(4, kind)
    row, reader = who.row(), Reader(Backend())
    reader.read([row], [[3, 1, 4, 1, 5]])
    row.back_to(2)
    assert row.read == 2
    reader.read([row], [[7]])
    assert np.array_equal(row.last, who.logits([3, 1, 7]))


def test_going_back_does_not_touch_the_rows_that_share_the_cache():
    many = [asked(seed) for seed in (1, 2, 3)]
    rows, reader = [who.row() for who in many], Reader(Backend())
    for tokens in ([3, 1], [4, 1]):
        reader.read(rows, [tokens] * 3)
    rows[1].back_to(1)
    reader.read(rows, [[7]] * 3)
    for who, row, ids in zip(many, rows, ([3, 1, 4, 1, 7], [3, 7], [3, 1, 4, 1, 7]), strict=True):
        assert np.array_equal(row.last, who.logits(ids))


def test_a_row_follows_another_of_its_request_and_leaves_it_where_it_is():
    """A sparse row goes on from the dense one, each with rows and neurons of its own, and comes back to it."""
    sparse = asked(5, "listed")
    dense = Asked(sparse.request, sparse.core, sparse.prompt, "decode_dense")
    one, other, beside = dense.row(), sparse.row(), asked(6)
    reader, third = Reader(Backend()), beside.row()
    reader.read([asked(7, "dense").row(), one], [[2, 2], [3, 1]])  # it lies second in the cache that both share
    other.follow(one)
    assert np.array_equal(other.last, dense.logits([3, 1])) and other.read == 2
    for token in (4, 1):
        reader.read([other, third], [[token], [token]])
    assert np.array_equal(other.last, sparse.logits([3, 1, 4, 1]))
    assert np.array_equal(third.last, beside.logits([4, 1]))
    reader.read([one], [[5]])
    assert np.array_equal(one.last, dense.logits([3, 1, 5]))
    other.follow(one)
    reader.read([other], [[9]])
    assert np.array_equal(other.last, sparse.logits([3, 1, 5, 9]))
    third.follow(third)
    assert third.read == 2
