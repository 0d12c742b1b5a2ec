"""Metrics of the batches that group commit has written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

RECENT_BATCHES = 1000
"""Number of batches on which means and percentiles are based."""


class WriteMetrics:
    """Counts and times of batches, for `Database.get_stats`; any thread may read them."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # for both below
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_BATCHES)
        self._totals: dict[str, Any] = {
            **dict.fromkeys(("batches", "operations", "failed_batches", "connections"), 0),
            **dict.fromkeys(("last_failure", "last_failure_at")),
        }

    def note_commit(self, operations: int, seconds: float) -> None:
        with self._lock:
            self._recent.append((operations, seconds))
            self._totals["batches"] += 1
            self._totals["operations"] += operations

    def note_connection(self) -> None:
        with self._lock:
            self._totals["connections"] += 1

    def note_failure(self, error: BaseException) -> None:
        text, failed_at = f"{type(error).__name__}: {error}", self._clock()
        with self._lock:
            self._totals["failed_batches"] += 1
            self._totals.update(last_failure=text, last_failure_at=failed_at)

    def figures(self) -> dict[str, Any]:
        with self._lock:
            totals = self._totals.copy()
            sizes, seconds = ([line[part] for line in self._recent] for part in (0, 1))
        seconds.sort()
        return {
            **totals,
            "mean_batch": sum(sizes) / len(sizes) if sizes else None,
            "largest_batch": max(sizes, default=None),
            "commit_seconds_p50": _percentile(seconds, 50),
            "commit_seconds_p99": _percentile(seconds, 99),
            "commit_seconds_max": _percentile(seconds, 100),
        }


def _percentile(in_order: Sequence[float], percent: int) -> float | None:
    return in_order[(len(in_order) * percent - 1) // 100] if in_order else None
