"""What a server of bundles counts: how long clients wait, how fast answers come, and what was pruned.

scheduler --Observer--> Measured --add, put, see--> a sink:  Prometheus (/metrics of `cm-export serve`), or another server's own

`FIGURES` says once what there is, so that every server has the same names. prometheus_client is imported by its sink alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..host.conversation import Answer

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ROWS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
_SPEEDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(frozen=True)
class Figure:
    """One thing that is counted. `label`: the name of the one thing by which it is told apart; "": nothing."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    label: str = ""
    buckets: tuple[float, ...] = ()


FIGURES = (
    Figure("cm_export_requests_total", "counter", "Requests that ended, by how", "outcome"),
    Figure("cm_export_requests_waiting", "gauge", "Requests that wait for a place"),
    Figure("cm_export_requests_running", "gauge", "Requests that are being answered"),
    Figure("cm_export_queue_seconds", "histogram", "From handing in to the start of the prefill", "", _SECONDS),
    Figure("cm_export_time_to_first_token_seconds", "histogram", "From handing in to the first token", "", _SECONDS),
    Figure("cm_export_request_seconds", "histogram", "From handing in to the end of an answer", "", _SECONDS),
    Figure("cm_export_answer_tokens_per_second", "histogram", "Speed of one answer after its first token", "", _SPEEDS),
    Figure("cm_export_step_seconds", "histogram", "One step of the decode loop", "", _SECONDS),
    Figure("cm_export_batch_rows", "histogram", "Requests that share one step", "", _ROWS),
    Figure(
        "cm_export_tokens_total", "counter", "Tokens of answered requests: prompt (image ones included), answer", "kind"
    ),
    Figure(
        "cm_export_image_tokens_kept_share", "histogram", "Image tokens that decode reads, of a request's", "", _SHARES
    ),
    Figure("cm_export_neurons_kept_share", "histogram", "FFN neurons that decode computes, of a layer's", "", _SHARES),
    Figure("cm_export_guard_tokens_total", "counter", "Tokens that the guard drafted, and those it kept", "kind"),
    Figure("cm_export_guard_interventions_total", "counter", "Times the guard widened what drafts compute", "action"),
)


class Sink(Protocol):
    """Where figures go; called in several threads, and must not raise."""

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count up."""

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""

    def see(self, name: str, value: float) -> None:
        """One more value of a histogram."""


class Measured:
    """An Observer of a scheduler that tells a sink."""

    def __init__(self, sink: Sink):
        self._sink = sink

    def waiting(self, queued: int, running: int) -> None:
        """How many wait, and how many are being answered, changed."""
        self._sink.put("cm_export_requests_waiting", queued)
        self._sink.put("cm_export_requests_running", running)

    def step(self, rows: int, seconds: float) -> None:
        """One token was read for that many rows."""
        self._sink.see("cm_export_batch_rows", rows)
        self._sink.see("cm_export_step_seconds", seconds)

    def ended(self, outcome: str, answer: Answer | None, seconds: float) -> None:
        """A request left."""
        self._sink.add("cm_export_requests_total", 1, outcome)
        if answer is not None:
            self._sink.see("cm_export_request_seconds", seconds)
            self._answered(answer.stats)

    def _answered(self, stats: Mapping[str, Any]) -> None:
        see, add = self._sink.see, self._sink.add
        see("cm_export_queue_seconds", stats["queue_s"])
        see("cm_export_time_to_first_token_seconds", stats["queue_s"] + stats["ttft_s"])
        add("cm_export_tokens_total", stats["prompt_tokens"], "prompt")
        add("cm_export_tokens_total", stats["new_tokens"], "answer")
        see("cm_export_neurons_kept_share", stats["neurons_kept"] / stats["neurons"])
        if stats["tokens_per_s"]:
            see("cm_export_answer_tokens_per_second", stats["tokens_per_s"])
        if stats["image_tokens"]:
            see("cm_export_image_tokens_kept_share", stats["image_tokens_kept"] / stats["image_tokens"])
        if guard := stats.get("guard"):
            add("cm_export_guard_tokens_total", guard["drafted"], "drafted")
            add("cm_export_guard_tokens_total", guard["kept"], "kept")
            for action in guard["actions"]:
                add("cm_export_guard_interventions_total", 1, action)


class Prometheus:
    """A sink in a registry of its own; `text` is what a Prometheus server reads."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._of: dict[str, Any] = {}
        for figure in FIGURES:
            labels = [figure.label] if figure.label else []
            more = {"buckets": figure.buckets} if figure.buckets else {}
            kind = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[figure.kind]
            self._of[figure.name] = kind(figure.name, figure.help, labels, registry=self._registry, **more)

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count up."""
        figure = self._of[name]
        (figure.labels(label) if label else figure).inc(amount)

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._of[name].set(value)

    def see(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        self._of[name].observe(value)

    def text(self) -> tuple[bytes, str]:
        """(all figures in Prometheus' text form, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
