"""The scheduler: each of many requests gets what it gets alone; rows come and go, and errors stay with whom they belong to."""

import gc
import threading
import time
import weakref

import pytest

import cm_export
from cm_export.base.errors import InputError
from cm_export.host.asking import asked
from cm_export.host.conversation import Conversation
from cm_export.host.decode import Row
from cm_export.host.runner import Prefilled, Runner
from cm_export.host.sampling import Sampling
from cm_export.recipe.aliases import DEMO
from cm_export.serving.scheduler import Scheduler, Unobserved
from cm_export.serving.ticket import Busy, Cancelled, Closed, Expired, Finished, Piece
from cm_export.serving.waiting import Waiting

IMAGES = sorted((DEMO.parent / "images").glob("*.png"))
QUESTION = "describe : what shape is in the image?"
LONG = {"max_new_tokens": 4000, "sampling": Sampling(min_new_tokens=4000)}  # its answer does not end by itself
UNEQUAL = (
    {"prompt": QUESTION, "images": IMAGES[0]},
    {"prompt": QUESTION, "images": IMAGES[1], "neuron_share": 0.3},
    {"prompt": QUESTION, "images": IMAGES[0], "token_share": 0.2, "max_new_tokens": 5},
    {"prompt": QUESTION, "images": IMAGES[1], "dense": True},
    {"prompt": "what color is it ?", "images": (IMAGES[0], IMAGES[1])},
    {"prompt": "hello", "max_new_tokens": 9},
    {"prompt": QUESTION, "images": IMAGES[0], "sampling": Sampling(temperature=1.0, seed=7)},
    {"prompt": QUESTION, "images": IMAGES[1], "guard": 4},
)


@pytest.fixture(scope="module")
def model(whole_bundle):
    with cm_export.load(whole_bundle, threads=1) as model:
        yield model


@pytest.fixture
def server(model):
    with Scheduler(model, at_once=4) as server:
        yield server


class Watching(Unobserved):
    def __init__(self):
        self.rows, self.outcomes, self.busy = [], [], []

    def waiting(self, queued, running):
        self.busy.append((queued, running))

    def step(self, rows, seconds):
        self.rows.append(rows)

    def ended(self, outcome, answer, seconds):
        self.outcomes.append(outcome)


def until(true, seconds=20.0):
    """Wait for what other threads do."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.005)


def test_unequal_requests_together_get_what_each_gets_alone(model, server):
    alone = [model.generate(**request) for request in UNEQUAL]
    tickets = [server.submit(asked(**request), client=str(i % 3)) for i, request in enumerate(UNEQUAL)]
    pieces = [list(ticket) for ticket in tickets]
    for ticket, text, expected in zip(tickets, pieces, alone, strict=True):
        assert "".join(text) == ticket.answer.text == expected.text
        assert ticket.answer.token_ids == expected.token_ids
        assert ticket.answer.stats["total_s"] >= ticket.answer.stats["queue_s"] >= 0
    assert len(pieces[3]) > 1  # it came as a stream


def test_several_lanes_share_the_requests_and_change_no_answer(model):
    alone = [model.generate(**request) for request in UNEQUAL]
    with Scheduler(model, at_once=8, lanes=3) as server:
        running = [server.submit(asked(QUESTION, image, **LONG)) for image in IMAGES[:2]]
        for ticket in running:
            next(ticket)
        assert sorted(lane.load for lane in server._lanes) == [0, 1, 1]
        tickets = [server.submit(asked(**request)) for request in UNEQUAL]
        assert [ticket.whole().token_ids for ticket in tickets] == [answer.token_ids for answer in alone]
        for ticket in running:
            ticket.cancel()
        until(lambda: server.load().running == 0)
        assert not any(lane.batch.rows or lane.rows for lane in server._lanes)


def test_a_newcomer_joins_while_others_write_and_no_row_is_left(model, server):
    first = server.submit(asked(QUESTION, IMAGES[0], **LONG))
    next(first)
    assert server.submit(asked(QUESTION, IMAGES[1])).whole().text == model.generate(QUESTION, IMAGES[1]).text
    assert first.answer is None
    first.cancel()
    with pytest.raises(Cancelled):
        first.whole()
    until(lambda: server.load().running == 0)
    assert not server._lanes[0].batch.rows and not server._lanes[0].rows


def test_the_row_of_the_cancelled_request_is_freed_and_no_other(model, server):
    events, how = [], {"max_new_tokens": 60, "sampling": Sampling(min_new_tokens=60)}
    server.submit(asked(QUESTION, IMAGES[0], **how), listener=events.append)
    until(lambda: events)
    others = [server.submit(asked(QUESTION, IMAGES[1], **LONG)) for _ in range(2)]
    for ticket in others:
        next(ticket)
        ticket.cancel()
    until(lambda: isinstance(events[-1], Finished))
    assert events[-1].answer.token_ids == model.generate(QUESTION, IMAGES[0], **how).token_ids
    until(lambda: server.load().running == 0)


def test_fifty_cancelled_requests_free_their_places(model, server):
    for i in range(50):
        ticket = server.submit(asked(QUESTION, IMAGES[i % 2], **LONG))
        if i % 2:
            next(ticket)
        ticket.cancel()
        with pytest.raises(Cancelled):
            ticket.whole()
    until(lambda: server.load().running == 0)
    assert server.load().queued == 0 and not server._lanes[0].batch.rows
    assert server.submit(asked(QUESTION, IMAGES[0])).whole().text == model.generate(QUESTION, IMAGES[0]).text


@pytest.mark.parametrize(
    "how", [{}, LONG, {"guard": 4}, LONG | {"guard": 4}], ids=("ends", "cancelled", "guarded", "both")
)
def test_what_a_request_held_is_freed_when_it_ends_and_not_when_the_collector_comes(model, monkeypatch, how):
    """A cache may be gigabytes, and the collector comes after thousands of objects."""
    held, prefill = [], Runner.prefill

    def watched(*args) -> Prefilled:
        found = prefill(*args)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Runner, "prefill", watched)
    gc.collect()
    gc.disable()
    try:
        with Scheduler(model, at_once=4) as server:
            ticket = server.submit(asked(QUESTION, IMAGES[0], **how))
            next(ticket)
            if "sampling" in how:
                ticket.cancel()
                with pytest.raises(Cancelled):
                    ticket.whole()
            else:
                ticket.whole()
            until(lambda: held[0]() is None)
    finally:
        gc.enable()


def test_a_full_queue_refuses_in_words_and_takes_requests_again_later(model):
    watching = Watching()
    with Scheduler(model, at_once=1, queued=2, observer=watching) as server:
        running = server.submit(asked(QUESTION, IMAGES[0], **LONG))
        next(running)
        waiting = [server.submit(asked(QUESTION, IMAGES[0])) for _ in range(2)]
        with pytest.raises(Busy, match="1 requests are being answered and 2 wait"):
            server.submit(asked(QUESTION, IMAGES[0]))
        assert watching.outcomes == ["refused"]
        running.cancel()
        assert len({ticket.whole().text for ticket in waiting}) == 1
        assert server.submit(asked(QUESTION, IMAGES[0])).whole().text == waiting[0].answer.text


def test_a_deadline_ends_a_waiting_request_with_an_error_and_a_started_one_with_what_it_has(model):
    with Scheduler(model, at_once=1) as server:
        running = server.submit(asked(QUESTION, IMAGES[0], **LONG), deadline=0.5)
        next(running)
        waiting = server.submit(asked(QUESTION, IMAGES[0]), deadline=0.05)
        with pytest.raises(Expired, match=r"within its 0\.05 s"):
            waiting.whole()
        stats = running.whole().stats
        assert stats["stopped"] == "deadline" and 0 < stats["new_tokens"] < 4000


def test_a_request_that_names_no_deadline_has_the_servers(model):
    with Scheduler(model, at_once=1, deadline=0.3) as server:
        assert server.submit(asked("hello", **LONG)).whole().stats["stopped"] == "deadline"


def test_a_guarded_request_is_cancelled_between_its_drafts(model, server):
    ticket = server.submit(asked(QUESTION, IMAGES[0], guard=4, **LONG))
    next(ticket)
    ticket.cancel()
    with pytest.raises(Cancelled):
        ticket.whole()
    until(lambda: server.load().running == 0, 5)


def test_the_wait_for_a_place_and_the_whole_time_are_told(model):
    with Scheduler(model, at_once=1) as server:
        first = server.submit(asked("hello", **LONG), deadline=0.4)
        second = server.submit(asked("hello", max_new_tokens=400, sampling=Sampling(min_new_tokens=400)))
        one, other = first.whole().stats, second.whole().stats
    assert one["queue_s"] < 0.2 and one["total_s"] >= 0.4
    assert 0.2 < other["queue_s"] < other["total_s"] - other["decode_s"]


def test_an_error_of_one_request_is_its_own(model, server, monkeypatch):
    def fails(logits, chosen):
        raise InputError("refused by the test", where="token")

    real = Conversation.begin
    victim = asked("hello", max_new_tokens=30)

    def begin(talk, prompt, limits):
        one = real(talk, prompt, limits)
        if limits is victim.limits:
            one.decoding.choose = fails
        return one

    monkeypatch.setattr(Conversation, "begin", begin)
    others = [server.submit(asked(QUESTION, image)) for image in IMAGES[:2]]
    with pytest.raises(InputError, match="refused by the test"):
        server.submit(victim).whole()
    assert [ticket.whole().text for ticket in others] == [model.generate(QUESTION, i).text for i in IMAGES[:2]]


def test_a_step_that_fails_for_one_row_leaves_the_others_their_answers(model, server, monkeypatch):
    real = server._lanes[0].batch._reader.read
    bad: list[Row] = []

    def read(rows, tokens):
        bad[:] = bad or [row for row in rows if row.limit == 17]
        if any(row in bad for row in rows):
            raise MemoryError("planted")
        return real(rows, tokens)

    monkeypatch.setattr(server._lanes[0].batch._reader, "read", read)
    others = [server.submit(asked(QUESTION, image, max_new_tokens=16)) for image in IMAGES[:2]]
    with pytest.raises(MemoryError, match="planted"):
        server.submit(asked(QUESTION, IMAGES[0], max_new_tokens=17)).whole()
    for ticket, image in zip(others, IMAGES[:2], strict=True):
        assert ticket.whole().text == model.generate(QUESTION, image, max_new_tokens=16).text


def test_what_can_be_seen_at_once_is_refused_before_anything_waits(model, server):
    with pytest.raises(InputError):
        server.submit(asked("hello", token_share=2.0))
    with pytest.raises(InputError, match="at_once"):
        Scheduler(model, at_once=0)
    assert server.load().queued == server.load().running == 0


def test_a_listener_that_breaks_ends_its_request_alone(model, server):
    seen = []

    def breaks(event):
        seen.append(event)
        raise BrokenPipeError

    server.submit(asked(QUESTION, IMAGES[0], **LONG), listener=breaks)
    until(lambda: seen and server.load().running == 0)
    assert isinstance(seen[0], Piece)
    assert server.submit(asked(QUESTION, IMAGES[0])).whole().text == model.generate(QUESTION, IMAGES[0]).text


def test_closing_answers_those_that_are_here_and_refuses_newcomers(model):
    server, events = Scheduler(model, at_once=1), []
    for image in IMAGES[:2]:
        server.submit(asked(QUESTION, image), listener=events.append)
    closing = threading.Thread(target=server.close)
    closing.start()
    until(lambda: not server.is_ready)
    with pytest.raises(Closed, match="takes no more requests"):
        server.submit(asked("hello"))
    closing.join(20)
    assert not closing.is_alive() and sum(isinstance(e, Finished) for e in events) == 2


def test_closing_without_draining_cancels_what_is_under_way(model):
    server = Scheduler(model, at_once=1)
    running, waiting = (server.submit(asked(QUESTION, IMAGES[0], **LONG)) for _ in range(2))
    next(running)
    server.close(drain=False)
    for ticket in (running, waiting):
        with pytest.raises(Cancelled):
            ticket.whole()


def test_a_fault_of_the_scheduler_ends_every_request_in_words(model, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread's own report
    server = Scheduler(model, at_once=1)
    monkeypatch.setattr(server._lanes[0], "_choose", lambda: 1 / 0)
    with pytest.raises(cm_export.CmExportError, match="ended by a fault"):
        server.submit(asked(QUESTION, IMAGES[0])).whole()
    assert not server.is_ready
    with pytest.raises(cm_export.CmExportError, match="ended by a fault"):
        server.submit(asked("hello"))


def test_whoever_watches_hears_of_every_step_and_every_end(model):
    watching = Watching()
    with Scheduler(model, at_once=4, observer=watching) as server:
        tickets = [server.submit(asked(QUESTION, image, **LONG)) for image in IMAGES[:2]]
        for ticket in tickets:
            next(ticket)
        until(lambda: 2 in watching.rows)
        tickets[0].cancel()
        tickets[1].cancel()
        server.submit(asked("hello")).whole()
        until(lambda: server.load().running == 0)
        assert (0, 2) in watching.busy and watching.busy[-1] == (0, 0)
    assert sorted(watching.outcomes) == ["answered", "cancelled", "cancelled"]


def test_clients_take_turns_and_the_requests_of_one_keep_their_order():
    waiting = Waiting[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        waiting.put(item[0], item)
    waiting.remove(["a2"])
    assert len(waiting) == 5 and sorted(waiting.all()) == ["a1", "a3", "b1", "b2", "c1"]
    assert [waiting.take() for _ in range(5)] == ["a1", "b1", "c1", "a3", "b2"]
    with pytest.raises(IndexError):
        waiting.take()
