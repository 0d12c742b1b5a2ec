"""Progress of long operations."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], object]
"""Receives the name of a step, the work done, and the total work; 0 if the total is unknown."""


class Progress:
    """Count and report the work done in one step; `total` is the work as far as known."""

    def __init__(self, report: Report | None, what: str, total: int) -> None:
        self._report = report
        self._what = what
        self._total = total
        self.done = 0
        self.add(0)

    def add(self, number: int) -> None:
        """Add work that was done."""
        self.done += number
        if self._report is not None:
            self._report(self._what, self.done, max(self._total, self.done))
