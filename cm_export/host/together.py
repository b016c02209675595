"""Several requests answered together: one decode loop over their rows, each with its own pictures, budget and length.

waiting   c d e          a row that ends makes room for the next request, whose prompt is read then
rows      a b            at most `at_once`: each holds its cache and its core rows
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..base.errors import InputError
from . import asking
from .asking import Asked
from .conversation import Answer, Answering, Conversation
from .decode import Batch, Row
from .runner import Runner


def answered(runner: Runner, requests: Sequence[Asked], at_once: int) -> list[Answer]:
    """The answers in the order of the requests. Raises InputError that says which request it is about."""
    batch, waiting = Batch(runner.backend), deque(range(len(requests)))
    rows: dict[Row, tuple[int, Conversation, Answering]] = {}
    answers: dict[int, Answer] = {}
    while waiting or rows:
        while waiting and len(rows) < at_once:
            i = waiting.popleft()
            row, talk, one = _begun(runner, requests[i], i)
            rows[row] = i, talk, one
            batch.add(row)
        for row, _ in batch.choose():
            one = rows[row][2]
            one.first = one.first or one.now()
        for row in [r for r in rows if r.ended]:
            i, talk, one = rows.pop(row)
            answers[i] = talk.end(one, row.ids)
        runner.check_open()
        if batch.rows:
            batch.read()
    return [answers[i] for i in range(len(requests))]


def _begun(runner: Runner, request: Asked, i: int) -> tuple[Row, Conversation, Answering]:
    try:
        talk = Conversation(runner, request)
        one = talk.begin(request.prompts[-1], request.limits)
    except InputError as e:
        raise asking.of_request(i, e) from e
    return one.decoding, talk, one
