"""How work that takes long tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], object]
"""Is told what is being done, how much of it is done, and how much there is to do."""


class Progress:
    """Counts what is done of one kind of work, and reports it.

    Args:
        report: Is told; `None` for nobody.
        what: What is being done.
        total: How much there is to do.
    """

    def __init__(self, report: Report | None, what: str, total: int) -> None:
        self._report = report
        self._what = what
        self._total = total
        self.done = 0
        """How much is done."""
        self.add(0)

    def add(self, number: int) -> None:
        """So much more is done."""
        self.done += number
        if self._report is not None:
            self._report(self._what, self.done, max(self._total, self.done))
