"""Prometheus metrics of a guard, with label sets that cannot grow."""

import math
from collections.abc import Sequence
from typing import Any

from aidefend._core.checks import check_int, check_items, check_kind, check_number, refuse
from aidefend._core.errors import MissingExtra

VERDICTS = ("accepted", "refused", "failed")
REASONS = ("none", "access", "budget", "specification", "detector", "error", "other")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_P_VALUES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


class Metrics:
    """Counts and histograms in a registry of their own.

    Guarantee: memory does not grow with traffic: labels are the closed sets VERDICTS and REASONS, anything else counts
        as "failed" and "other"; principals are never labels.
    Args:
        namespace: First part of every metric's name.
        registry: A prometheus_client CollectorRegistry to join, or None for a new one.
    Raises: MissingExtra: prometheus-client is not installed (`aidefend[metrics]`).
    Cost: Microseconds a call; no input or output.
    Example:
        >>> metrics = Metrics()
        >>> metrics.observe(verdict="accepted", reason="none", rows=2, seconds=0.01, p_values=[0.4, 0.9])
        >>> 'aidefend_rows_total{reason="none",verdict="accepted"} 2.0' in metrics.text()
        True
    """

    def __init__(self, namespace: str = "aidefend", registry: Any = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingExtra("prometheus-client", "metrics") from error
        self._render = prometheus.generate_latest
        self.registry = prometheus.CollectorRegistry() if registry is None else registry
        check_kind(namespace, str, "namespace", "Use letters, digits and underscores, such as 'aidefend'")
        if not hasattr(self.registry, "register"):
            raise refuse("registry to be a CollectorRegistry", "registry", registry, "Pass None for a new one")
        place: dict[str, Any] = {"namespace": namespace, "registry": self.registry}
        labels = ("verdict", "reason")
        self._requests = prometheus.Counter("requests", "Calls of the guard.", labels, **place)
        self._rows = prometheus.Counter("rows", "Rows of these calls.", labels, **place)
        seconds = prometheus.Histogram("seconds", "Time of a call in seconds.", buckets=_SECONDS, **place)
        self._seconds = seconds
        self._p_values = prometheus.Histogram("p_value", "Combined p-value of a row.", buckets=_P_VALUES, **place)
        self._exhausted = prometheus.Counter("budget_exhausted", "Calls refused for lack of budget.", **place)

    def observe(self, *, verdict: str, reason: str, rows: int, seconds: float, p_values: Sequence[float] = ()) -> None:
        """Record one call of a guard.

        Args:
            verdict: One of VERDICTS.
            reason: One of REASONS: the first that decided.
            rows: Rows of the call, >= 0.
            seconds: Its duration, >= 0.
            p_values: Combined p-values of the rows that have one; values that are not numbers are left out.
        """
        labels = (_one_of(verdict, VERDICTS, "failed"), _one_of(reason, REASONS, "other"))
        numbers = check_items(p_values, (float, int), "p_values", "Pass a list of numbers")
        self._requests.labels(*labels).inc()
        self._rows.labels(*labels).inc(check_int(rows, "rows", 0))
        self._seconds.observe(check_number(seconds, "seconds", 0.0))
        if labels[1] == "budget":
            self._exhausted.inc()
        for value in numbers:
            if math.isfinite(value):
                self._p_values.observe(value)

    def text(self) -> str:
        """The metrics in Prometheus' text format, for your own HTTP handler."""
        return str(self._render(self.registry).decode())


def _one_of(label: object, known: tuple[str, ...], other: str) -> str:
    return label if isinstance(label, str) and label in known else other
