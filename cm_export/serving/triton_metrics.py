"""Figures of the scheduler among the metrics of a Triton server: http://HOST:8002/metrics shows them beside its own.

decode thread: see("cm_export_step_seconds", 0.004)  ->  kept here  ->  flush, in the one thread that talks with the server
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from .metrics import FIGURES


class TritonSink:
    """A sink (metrics.py) over triton_python_backend_utils. Nothing waits for the server but `flush`."""

    def __init__(self, utils: Any, labels: Mapping[str, str]):
        self._labels, self._lock = dict(labels), threading.Lock()
        self._figures = {figure.name: figure for figure in FIGURES}
        family = utils.MetricFamily
        kinds = {"counter": family.COUNTER, "gauge": family.GAUGE, "histogram": family.HISTOGRAM}
        self._families = {f.name: family(name=f.name, description=f.help, kind=kinds[f.kind]) for f in FIGURES}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._sums: dict[tuple[str, str], float] = {}
        self._values: dict[str, float] = {}
        self._seen: list[tuple[str, float]] = []
        for figure in FIGURES:  # those without a label are there from the start: an alert needs a value, if it is 0
            if not figure.label:
                self._metric(figure.name, "")

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count up."""
        with self._lock:
            self._sums[name, label] = self._sums.get((name, label), 0) + amount

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def see(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        with self._lock:
            self._seen.append((name, value))

    def flush(self) -> None:
        """Tell the server what was counted since the last time."""
        with self._lock:
            sums, values, seen = self._sums, self._values, self._seen
            self._sums, self._values, self._seen = {}, {}, []
        for (name, label), amount in sums.items():
            self._metric(name, label).increment(amount)
        for name, value in values.items():
            self._metric(name, "").set(value)
        for name, value in seen:
            self._metric(name, "").observe(value)

    def _metric(self, name: str, label: str) -> Any:
        if (name, label) not in self._metrics:
            figure = self._figures[name]
            more = {"buckets": list(figure.buckets)} if figure.kind == "histogram" else {}
            labels = self._labels | ({figure.label: label} if label else {})
            self._metrics[name, label] = self._families[name].Metric(labels=labels, **more)
        return self._metrics[name, label]
