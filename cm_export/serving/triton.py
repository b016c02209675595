"""The Python model `vlm` of a Triton repository: tensors of a request in, an answer out piece by piece (docs/triton.md).

text_input, images, token_share, ...  ->  wire.read  ->  scheduler  ->  text_output "A re", text_output "d circle", figures
execute                                   readers        its threads    the line: one thread that talks with the server

`execute` returns at once: each request is read in one of a few threads, and answered by the scheduler together with others.
Whatever is said to the server is said by one thread, since a server ended by a fault of its own where several threads did
(2.51); the decode loop waits for it only when thousands of pieces are on their way. One response of each request carries
the final flag, whatever happens. No torch, and nothing of Triton is imported: `utils` is triton_python_backend_utils.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import CmExportError, InputError
from ..host import loaded
from ..host.loaded import LoadedBundle
from . import triton_graphs, triton_request
from .cores import divided
from .metrics import Measured
from .pools import few_pools
from .scheduler import Scheduler
from .ticket import Busy, Cancelled, Event, Expired, Failed, Finished, Ticket
from .triton_metrics import TritonSink
from .triton_request import Given
from .triton_settings import BLS, Settings
from .warm_up import warm
from .wire import Wanted

BUNDLE = "bundle"  # where the bundle lies, beside model.py
_READERS = 4  # requests whose pictures are decoded at the same time
_POLL = 0.05  # seconds between looks at who has gone
_DRAIN = 60.0  # seconds for those that are being answered when the model is unloaded
_ON_THE_WAY = 4096  # responses that were not sent yet


class Model:
    """What model.py of the repository hands Triton's three calls to."""

    def __init__(self, args: dict[str, str], utils: Any):
        """`args`: as Triton gives them to `initialize`. Raises InputError, BundleError: the model is not loaded then."""
        self.settings = Settings.of(json.loads(args["model_config"]).get("parameters", {}))
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._utils = utils
        few_pools()
        self.model, lanes = opened(folder, self.settings, utils)
        self.model.bundle.wait_verified()
        self._sink = TritonSink(utils, {"model": args["model_name"], "version": args["model_version"]})
        at_once, queued, deadline = self.settings.at_once, self.settings.queued, self.settings.deadline
        self.scheduler = Scheduler(self.model, at_once, queued, Measured(self._sink), deadline, lanes)
        _log({"model": args["model_name"], "lanes": lanes, "execution": self.settings.execution})
        self._warm_up()
        self._readers = ThreadPoolExecutor(_READERS, "cm-export-read")
        self._clients = set[_Client]()
        self._change, self._closing = threading.Lock(), threading.Event()
        self._line: queue.Queue[_Response] = queue.Queue(_ON_THE_WAY)
        self._talking = threading.Thread(target=self._talk, name="cm-export-line", daemon=True)
        self._talking.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests on; their answers come later, from other threads."""
        for request in requests:
            sender, name = request.get_response_sender(), request.request_id()
            client = _Client(self._utils, sender, name, self._line)
            with self._change:
                full = len(self._clients) >= 2 * (self.settings.at_once + self.settings.queued)
                self._clients.add(client)
            try:
                given = triton_request.tensors(request, self._utils)  # copies: their memory is Triton's
            except Exception as error:
                client.fail(error)
                continue
            if full:
                what = "more requests are here than can wait"
                client.fail(Busy(what, where="the server", fix="try again in a few seconds"))
            else:
                self._readers.submit(self._begin, client, given)

    def _begin(self, client: _Client, given: Given) -> None:
        """Read a request and hand it to the scheduler; in a thread of its own, since pictures may be large."""
        try:
            client.wanted = wanted = triton_request.read(given, self.settings)
            ticket = self.scheduler.submit(
                wanted.asked, given.client, wanted.deadline, client.listen, client.id or None
            )  # fmt: skip
        except Exception as error:
            client.fail(error)
            return
        client.ticket = ticket
        if client.gone:
            ticket.cancel()

    def _talk(self) -> None:
        """The one thread that says something to the server: responses, figures, and whether somebody has gone."""
        looked = time.monotonic()
        while not (self._closing.is_set() and self._line.empty()):
            try:
                response = self._line.get(timeout=_POLL)
            except queue.Empty:
                pass
            else:
                self._send(response)
            if time.monotonic() - looked > _POLL:
                with self._change:
                    clients = list(self._clients)
                for client in clients:
                    client.look()  # Triton tells only those who ask
                self._sink.flush()
                looked = time.monotonic()

    def _send(self, response: _Response) -> None:
        client = response.client
        try:
            if response.outcome is None:
                client.sender.send(response.of_triton)
            else:
                client.sender.send(response.of_triton, self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # the server has given this request up
            client.leave()
            _log({"id": client.id, "outcome": "not sent", "error": f"{type(error).__name__}: {error}"})
        if response.outcome is not None:
            with self._change:
                self._clients.discard(client)
            _log({"id": client.id, **response.outcome, "total_s": round(time.perf_counter() - client.started, 4)})

    def _warm_up(self) -> None:
        """Make every session, and touch what the largest picture needs, before Triton calls the model ready.

        With graphs of the server (execution: bls) their own warm-up does that; they may be loaded after this model.
        """
        side = self.settings.warm_up_pixels
        if self.settings.execution != BLS and side >= 0:
            warm(self.model, side)

    def close(self) -> None:
        """Answer those that are here, then free everything."""
        self._readers.shutdown(wait=True)
        self.scheduler.close(drain=True, seconds=_DRAIN)
        self._closing.set()
        self._talking.join()
        self._sink.flush()
        self.model.close()


def _log(line: dict[str, Any]) -> None:
    """One line of JSON for each request, by its id; nothing of what was asked or answered."""
    print(json.dumps({"log": "cm-export", **line}), file=sys.stderr, flush=True)


def opened(folder: Path, settings: Settings, utils: Any) -> tuple[LoadedBundle, int]:
    """The bundle with its sessions, in this process or as models of the server, and its lanes (see cores.py).

    Raises InputError, BundleError.
    """
    bundle = loaded.opened(folder)
    if settings.execution != BLS:
        threads, lanes = divided(bundle, settings.backend, settings.threads, settings.lanes, settings.at_once)
        return LoadedBundle(bundle, threads, backend=settings.backend), lanes
    model = LoadedBundle(bundle, settings.threads, backend="onnxruntime")  # makes no session unless one is asked for
    model.backend = triton_graphs.Backend(model.bundle, settings.backend, settings.threads, utils)
    return model, settings.lanes or 1


@dataclass(eq=False)
class _Client:
    """Whoever waits for one answer: gets pieces of it, and exactly one final response."""

    utils: Any
    sender: Any
    id: str
    line: queue.Queue[_Response]
    wanted: Wanted | None = None
    ticket: Ticket | None = None
    gone: bool = False
    over: bool = False  # its final response is on its way
    started: float = field(default_factory=time.perf_counter)

    def look(self) -> None:
        """Cancel it where its stream was closed."""
        if not (self.gone or self.over) and self.sender.is_cancelled():
            self.leave()

    def leave(self) -> None:
        """It wants nothing any more; where it was not handed to the scheduler yet, that happens afterwards."""
        self.gone = True
        if self.ticket is not None:
            self.ticket.cancel()

    def listen(self, event: Event) -> None:
        """Called by the scheduler."""
        if isinstance(event, Failed):
            self.fail(event.error)
        elif isinstance(event, Finished):
            self._finish(event)
        elif self.wanted is not None and self.wanted.stream:
            self._say(triton_request.piece(event.text, self.utils))

    def _finish(self, event: Finished) -> None:
        assert self.wanted is not None  # it was read before it was answered
        stats = event.answer.stats
        names = ("prompt_tokens", "new_tokens", "image_tokens", "image_tokens_kept", "queue_s", "ttft_s", "stopped")
        outcome = {"outcome": "answered", **{name: stats[name] for name in names}}
        self._say(triton_request.final(event.answer, self.wanted, self.utils), outcome=outcome)

    def fail(self, error: Exception) -> None:
        """Say why there is no answer."""
        codes = self.utils.TritonError
        code = codes.INTERNAL
        if isinstance(error, InputError):
            code = codes.INVALID_ARG
        elif isinstance(error, Cancelled):
            code = codes.CANCELLED
        elif isinstance(error, Busy | Expired):
            code = codes.UNAVAILABLE
        text = str(error) if isinstance(error, CmExportError) else f"{type(error).__name__}: {error}"
        outcome = {"outcome": type(error).__name__, "error": text if code == codes.INTERNAL else None}
        self._say([], codes(text, code), outcome)

    def _say(self, tensors: list[Any], error: Any = None, outcome: dict[str, Any] | None = None) -> None:
        if not self.over:
            self.over = outcome is not None
            self.line.put(_Response(self, self.utils.InferenceResponse(tensors, error), outcome))


@dataclass(frozen=True)
class _Response:
    """Something to send; `outcome`: of the last one, for the log."""

    client: _Client
    of_triton: Any
    outcome: dict[str, Any] | None
