"""Figures of the scheduler among the metrics of a Triton server: http://HOST:8002/metrics shows them beside its own.

cm_export_queue_seconds_bucket{model="vlm",version="1",le="0.5"} 12
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from .metrics import FIGURES, Figure


class TritonSink:
    """A sink (metrics.py) over triton_python_backend_utils."""

    def __init__(self, utils: Any, labels: Mapping[str, str]):
        self._labels, self._lock = dict(labels), threading.Lock()
        self._figures = {figure.name: figure for figure in FIGURES}
        family = utils.MetricFamily
        kinds = {"counter": family.COUNTER, "gauge": family.GAUGE, "histogram": family.HISTOGRAM}
        self._families = {f.name: family(name=f.name, description=f.help, kind=kinds[f.kind]) for f in FIGURES}
        self._metrics: dict[tuple[str, str], Any] = {}
        for figure in FIGURES:  # those without a label are there from the start: an alert needs a value, if it is 0
            if not figure.label:
                self._metric(figure, "")

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Count up."""
        self._metric(self._figures[name], label).increment(amount)

    def put(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metric(self._figures[name], "").set(value)

    def see(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        self._metric(self._figures[name], "").observe(value)

    def _metric(self, figure: Figure, label: str) -> Any:
        with self._lock:
            if (figure.name, label) not in self._metrics:
                more = {"buckets": list(figure.buckets)} if figure.kind == "histogram" else {}
                labels = self._labels | ({figure.label: label} if label else {})
                self._metrics[figure.name, label] = self._families[figure.name].Metric(labels=labels, **more)
            return self._metrics[figure.name, label]
