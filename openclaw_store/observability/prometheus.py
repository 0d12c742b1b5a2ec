"""Prometheus: the metrics of one process and of its database as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family

from openclaw_store.database import Database
from openclaw_store.database.telemetry import Handler
from openclaw_store.maintenance.read_around import ReadAround, on_connection
from openclaw_store.observability.catalogue import BUCKETS, Kind, Metric
from openclaw_store.observability.measurement import Meter, Record, Sample, read_samples

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusExporter:
    """Measures a database from now on; `text` returns all metrics."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._read = ReadAround(database.read)
        self._registry = CollectorRegistry()
        self.meter = Meter(database, self)
        self.note_commit, self.attach = self.meter.note_commit, self.meter.attach
        database.writer.telemetry += (self,)

    def traced(self, handler: Handler) -> Handler:
        """Return the handler itself: Prometheus has no traces."""
        return handler

    def recorder(self, metric: Metric) -> Record:
        """Return the function that records values of a counter or histogram."""
        labels = [_label(metric)] if metric.attribute else []
        if metric.kind is Kind.HISTOGRAM:
            observe = Histogram(
                metric.prometheus_name,
                metric.text,
                registry=self._registry,
                buckets=BUCKETS[metric],
            ).observe
            return lambda value, _: observe(value)
        counter = Counter(metric.prometheus_name, metric.text, labels, registry=self._registry)
        if not labels:
            return lambda value, _: counter.inc(value)
        return lambda value, attribute: counter.labels(attribute).inc(value)

    async def text(self) -> bytes:
        """Read the database, and return all metrics in Prometheus's format.

        Raises:
            UnavailableError: If the database cannot be read.
        """
        now = self._database.clock()
        samples = await self._read(on_connection(lambda one: read_samples(one, now)))
        revision = next(int(one.value) for one in samples if one.metric.name.endswith("revision"))
        samples += [*self.meter.of_process(), self.meter.lag(revision)]
        return generate_latest(self._registry) + generate_latest(_present(samples))


class _Samples:
    """Present values, as a collector."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Family]:
        families: dict[Metric, Any] = {}
        for metric, value, attribute in self._samples:
            if metric not in families:
                kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
                labels = [_label(metric)] if metric.attribute else []
                families[metric] = kind(metric.prometheus_name, metric.text, labels=labels)
            families[metric].add_metric([attribute] if metric.attribute else [], value)
        yield from families.values()


def _present(samples: list[Sample]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Samples(samples))
    return registry


def _label(metric: Metric) -> str:
    return metric.attribute.replace(".", "_")
