"""Figures of the scheduler among the metrics of a Triton server: http://HOST:8002/metrics shows them beside its own.

cm_export_queue_seconds{model="vlm",version="1"}       a histogram where that server's Python backend has them, else
cm_export_queue_seconds_sum, cm_export_queue_seconds_count       two counters, whose quotient is the mean
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from .metrics import FIGURES, Figure


class TritonSink:
    """A sink (metrics.py) over triton_python_backend_utils."""

    def __init__(self, utils: Any, labels: Mapping[str, str]):
        self._utils, self._labels, self._lock = utils, dict(labels), threading.Lock()
        self._figures = {figure.name: figure for figure in FIGURES}
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        self._histograms = hasattr(utils.MetricFamily, "HISTOGRAM")
        for figure in FIGURES:  # those without a label are there from the start: an alert needs a value, if it is 0
            if not figure.label:
                for name in self._names(figure):
                    self._metric(name, figure, "")

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count up."""
        self._metric(name, self._figures[name], label).increment(amount)

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metric(name, self._figures[name], "").set(value)

    def see(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        figure = self._figures[name]
        if self._histograms:
            self._metric(name, figure, "").observe(value)
        else:
            total, count = self._names(figure)
            self._metric(total, figure, "").increment(value)
            self._metric(count, figure, "").increment(1)

    def _names(self, figure: Figure) -> tuple[str, ...]:
        apart = figure.kind == "histogram" and not self._histograms
        return (f"{figure.name}_sum", f"{figure.name}_count") if apart else (figure.name,)

    def _metric(self, name: str, figure: Figure, label: str) -> Any:
        with self._lock:
            if (name, label) not in self._metrics:
                family, kinds = self._utils.MetricFamily, {"counter": "COUNTER", "gauge": "GAUGE"}
                if name not in self._families:
                    kind = kinds.get(figure.kind, "HISTOGRAM" if self._histograms else "COUNTER")
                    self._families[name] = family(name=name, description=figure.help, kind=getattr(family, kind))
                more = {"buckets": list(figure.buckets)} if figure.kind == "histogram" and self._histograms else {}
                labels = self._labels | ({figure.label: label} if label else {})
                self._metrics[name, label] = self._families[name].Metric(labels=labels, **more)
            return self._metrics[name, label]
