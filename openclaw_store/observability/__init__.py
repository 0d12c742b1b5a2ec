"""Figures and traces for machines: OpenTelemetry and Prometheus.

Nothing here is loaded, and nothing is measured, before a program calls `instrument` or serves
metrics. The catalogue names every metric once; no identifier, name or user is ever an attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openclaw_store.database import Database
from openclaw_store.errors import UnavailableError
from openclaw_store.observability.catalogue import METRICS, Kind, Metric

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from openclaw_store.observability.opentelemetry import Instrumentation

__all__ = ["METRICS", "Kind", "Metric", "instrument"]


def instrument(
    database: Database,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
) -> Instrumentation:
    """Measure and trace a database, and the managers and workers that are made from now on.

    Args:
        database: Call this before making a `StateManager` or `Worker` of it.
        meter_provider: Receives the metrics; `None` for the global one.
        tracer_provider: Receives the spans; `None` for the global one.

    Returns:
        The telemetry; its `remove` ends the measurement.

    Raises:
        UnavailableError: If `opentelemetry-api` is not installed.
    """
    try:
        from openclaw_store.observability.opentelemetry import Instrumentation
    except ImportError as error:
        raise UnavailableError(
            'traces and metrics need a package: pip install "openclaw-store[otel]"'
        ) from error
    return Instrumentation(database, meter_provider, tracer_provider)
