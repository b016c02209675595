"""The Python model `vlm` of a Triton repository: tensors of a request in, an answer out piece by piece (docs/triton.md).

text_input, images, token_share, ...  ->  wire.read  ->  scheduler  ->  text_output "A re", text_output "d circle", figures

`execute` returns at once: each request is read in one of a few threads, answered by the scheduler together with others,
and sent from its threads. One response of each request carries the final flag, whatever happens. No torch, and nothing of
Triton is imported: `utils` is triton_python_backend_utils, which exists inside a server only.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..base.errors import CmExportError, InputError
from ..host.loaded import LoadedBundle, load
from . import triton_graphs, triton_request
from .metrics import Measured
from .scheduler import Scheduler
from .ticket import Busy, Cancelled, Event, Expired, Failed, Finished, Ticket
from .triton_metrics import TritonSink
from .triton_request import Given
from .triton_settings import BLS, Settings
from .wire import Wanted

BUNDLE = "bundle"  # where the bundle lies, beside model.py
_READERS = 4  # requests whose pictures are decoded at the same time
_POLL = 0.05  # seconds between looks at who has gone
_DRAIN = 60.0  # seconds for those that are being answered when the model is unloaded


class Model:
    """What model.py of the repository hands Triton's three calls to."""

    def __init__(self, args: dict[str, str], utils: Any):
        """`args`: as Triton gives them to `initialize`. Raises InputError, BundleError: the model is not loaded then."""
        self.settings = Settings.of(json.loads(args["model_config"]).get("parameters", {}))
        folder = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._utils, self._log = utils, utils.Logger
        self.model = opened(folder, self.settings, utils)
        self.model.bundle.wait_verified()
        sink = TritonSink(utils, {"model": args["model_name"], "version": args["model_version"]})
        observer, at_once, queued = Measured(sink), self.settings.at_once, self.settings.queued
        self.scheduler = Scheduler(self.model, at_once, queued, observer, self.settings.deadline)
        self._warm_up()
        self._readers = ThreadPoolExecutor(_READERS, "cm-export-read")
        self._clients = set[_Client]()
        self._change, self._closing = threading.Lock(), threading.Event()
        self._poller = threading.Thread(target=self._poll, name="cm-export-poll", daemon=True)
        self._poller.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests on; their answers come later, from other threads."""
        for request in requests:
            client = _Client(self._utils, request.get_response_sender(), request.request_id(), self._ended)
            try:
                given = triton_request.tensors(request, self._utils)  # copies: their memory is Triton's
            except Exception as error:
                client.fail(error)
                continue
            with self._change:
                full = len(self._clients) >= 2 * (self.settings.at_once + self.settings.queued)
                self._clients.add(client)
            if full:
                what = f"{len(self._clients)} requests are here, which is more than can wait"
                client.fail(Busy(what, where="the server", fix="try again in a few seconds"))
            else:
                self._readers.submit(self._begin, client, given)

    def _begin(self, client: _Client, given: Given) -> None:
        """Read a request and hand it to the scheduler; in a thread of its own, since pictures may be large."""
        try:
            wanted = triton_request.read(given, self.settings)
            client.wanted = wanted
            who, wait = given.client, wanted.deadline
            ticket = self.scheduler.submit(wanted.asked, who, wait, client.listen, client.id or None)
        except Exception as error:
            client.fail(error)
            return
        client.begun(ticket)

    def _ended(self, client: _Client, outcome: dict[str, Any]) -> None:
        with self._change:
            self._clients.discard(client)
        # One line for each request, by its id; nothing of what was asked or answered.
        self._log.log_info("cm-export request " + json.dumps(outcome))

    def _poll(self) -> None:
        """Cancel what nobody reads any more: Triton tells only those who ask."""
        while not self._closing.wait(_POLL):
            with self._change:
                clients = list(self._clients)
            for client in clients:
                client.look()

    def _warm_up(self) -> None:
        """Make every session, and touch what the largest picture needs, before Triton calls the model ready.

        With graphs of the server (execution: bls) their own warm-up does that; they may be loaded after this model.
        """
        side = self.settings.warm_up_pixels
        if self.settings.execution == BLS or side < 0:
            return
        pictures = [Image.new("RGB", (side, side))] if side else []
        self.model.generate("Describe the picture.", pictures, max_new_tokens=2)

    def close(self) -> None:
        """Answer those that are here, then free everything."""
        self._readers.shutdown(wait=True)
        self.scheduler.close(drain=True, seconds=_DRAIN)
        self._closing.set()
        self._poller.join()
        self.model.close()


def opened(folder: Path, settings: Settings, utils: Any) -> LoadedBundle:
    """The bundle with its sessions, in this process or as models of the server. Raises InputError, BundleError."""
    if settings.execution != BLS:
        return load(folder, settings.threads, backend=settings.backend)
    model = load(folder, settings.threads, backend="onnxruntime")  # which makes no session unless one is asked for
    model.backend = triton_graphs.Backend(model.bundle, settings.backend, settings.threads, utils)
    return model


@dataclass(eq=False)
class _Client:
    """Whoever waits for one answer: gets pieces of it, and exactly one final response."""

    utils: Any
    sender: Any
    id: str
    told: Callable[[_Client, dict[str, Any]], None]
    wanted: Wanted | None = None
    ticket: Ticket | None = None
    gone: bool = False
    over: bool = False
    started: float = field(default_factory=time.perf_counter)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def begun(self, ticket: Ticket) -> None:
        """It was handed to the scheduler; perhaps it has been given up meanwhile."""
        with self.lock:
            self.ticket = ticket
            gone = self.gone
        if gone:
            ticket.cancel()

    def look(self) -> None:
        """Cancel it where its stream was closed."""
        with self.lock:
            if self.gone or self.over or not self.sender.is_cancelled():
                return
            self.gone, ticket = True, self.ticket
        if ticket is not None:
            ticket.cancel()

    def listen(self, event: Event) -> None:
        """Called by the scheduler."""
        if isinstance(event, Failed):
            self.fail(event.error)
        elif isinstance(event, Finished):
            self._finish(event)
        elif self.wanted is not None and self.wanted.stream:
            self._send(triton_request.piece(event.text, self.utils))

    def _finish(self, event: Finished) -> None:
        assert self.wanted is not None  # it was read before it was answered
        tensors = triton_request.final(event.answer, self.wanted, self.utils)
        stats = event.answer.stats
        names = ("prompt_tokens", "new_tokens", "image_tokens", "image_tokens_kept", "queue_s", "ttft_s", "stopped")
        self._send(tensors, final={"outcome": "answered", **{name: stats[name] for name in names}})

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
        self._send([], codes(text, code), outcome)

    def _send(self, tensors: list[Any], error: Any = None, final: dict[str, Any] | None = None) -> None:
        """One response. The last one is sent once, so that Triton forgets the request; whoever is gone gets no more."""
        with self.lock:
            if self.over:
                return
            self.over = final is not None
            response = self.utils.InferenceResponse(tensors, error)
            try:
                if final is None:
                    self.sender.send(response)
                else:
                    self.sender.send(response, self.utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            finally:
                if final is not None:
                    seconds = round(time.perf_counter() - self.started, 4)
                    self.told(self, {"id": self.id, **final, "total_s": seconds})
