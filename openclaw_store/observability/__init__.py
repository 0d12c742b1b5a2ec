"""Figures and traces for machines: OpenTelemetry and Prometheus.

Nothing here is loaded, and nothing is measured, before a program calls `instrument` or serves
metrics. The catalogue names every metric once; no identifier, name or user is ever an attribute.
"""

from openclaw_store.observability.catalogue import METRICS, Kind, Metric
from openclaw_store.observability.opentelemetry import Instrumentation, instrument

__all__ = ["METRICS", "Instrumentation", "Kind", "Metric", "instrument"]
