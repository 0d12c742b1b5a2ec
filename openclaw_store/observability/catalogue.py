"""The catalogue: every metric with its kind, unit and attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final, NamedTuple


class Kind(StrEnum):
    """What a metric is for OpenTelemetry and for Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """One metric."""

    name: str
    kind: Kind
    unit: str
    """`s`, `By`, or a thing in braces."""
    text: str
    attribute: str = ""
    """The name of its attribute; empty for none."""
    is_of_process: bool = True
    """True if it counts the work of one process, false if each process would report the same."""

    @property
    def prometheus_name(self) -> str:
        """The name in the text of Prometheus, without `_total`."""
        ending = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return self.name.replace(".", "_") + ending


SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Limits of the buckets of commits."""

LONG_SECONDS: Final = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
"""Limits of the buckets of tasks."""

SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
"""Limits of the buckets of batches."""

_P = "openclaw.store."
_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

COMMIT_DURATION = Metric(f"{_P}commit.duration", _H, "s", "Duration of a commit of the writer.")
COMMIT_SIZE = Metric(f"{_P}commit.size", _H, "{operation}", "Operations in a commit.")
COMMIT_FAILURES = Metric(f"{_P}commit.failures", _C, "{commit}", "Batches that failed as a whole.")
QUEUE = Metric(f"{_P}writer.queue", _G, "{operation}", "Operations that wait for the writer.")
CONNECTIONS = Metric(
    f"{_P}writer.connections", _C, "{connection}", "Connections that the writer has opened."
)
REFUSALS = Metric(
    f"{_P}operation.refusals", _C, "{operation}", "Operations refused, by error.", "error.type"
)
SUBMITTED = Metric(f"{_P}task.submitted", _C, "{task}", "Tasks that were added.")
CLAIMED = Metric(f"{_P}task.claimed", _C, "{task}", "Tasks that nodes have claimed.")
FINISHED = Metric(f"{_P}task.finished", _C, "{task}", "Tasks that have ended.", "status")
WAITING_TIME = Metric(
    f"{_P}task.waiting_time", _H, "s", "Time from the submission of a task to its start."
)
RUNNING_TIME = Metric(
    f"{_P}task.running_time", _H, "s", "Time from the start of a task to its end."
)
CACHED = Metric(f"{_P}cache.tasks", _G, "{task}", "Tasks in the memory of managers.")
LAG = Metric(
    f"{_P}feed.lag", _G, "{change}", "Changes in the database that a manager has not seen."
)
TASKS = Metric(f"{_P}tasks", _G, "{task}", "Tasks by status.", "status", False)
NODES = Metric(f"{_P}nodes", _G, "{node}", "Nodes by status.", "status", False)
OLDEST = Metric(f"{_P}tasks.oldest_waiting", _G, "s", "Age of the oldest waiting task.", "", False)
STUCK = Metric(
    f"{_P}tasks.stuck", _G, "{task}", "Tasks that do not advance; a lower bound.", "reason", False
)
REVISION = Metric(f"{_P}feed.revision", _G, "{change}", "The newest revision.", "", False)
SIZE = Metric(f"{_P}database.size", _G, "By", "Size of the database.", "", False)

METRICS: Final[Sequence[Metric]] = (
    *(COMMIT_DURATION, COMMIT_SIZE, COMMIT_FAILURES, QUEUE, CONNECTIONS, REFUSALS),
    *(SUBMITTED, CLAIMED, FINISHED, WAITING_TIME, RUNNING_TIME, CACHED, LAG),
    *(TASKS, NODES, OLDEST, STUCK, REVISION, SIZE),
)
"""All metrics."""

BUCKETS: Final[Mapping[Metric, Sequence[float]]] = {
    COMMIT_DURATION: SECONDS,
    COMMIT_SIZE: SIZES,
    WAITING_TIME: LONG_SECONDS,
    RUNNING_TIME: LONG_SECONDS,
}
"""The limits of the buckets of each histogram."""
