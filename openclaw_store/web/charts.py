"""Charts as coordinates of small SVG pictures, 600 × 120, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from openclaw_store.maintenance.statistics import Interval, Timing

WIDTH, HEIGHT = 600, 120


@dataclass(frozen=True)
class Bar:
    """A minute: its finished tasks, the failed ones of them at the bottom."""

    x: float
    width: float
    finished: float
    failed: float
    interval: Interval


@dataclass(frozen=True)
class Chart:
    """Bars or lines, and the value at the top."""

    top: float
    bars: Sequence[Bar] = ()
    lines: Sequence[tuple[str, str]] = ()
    """Name and points of each line."""


def bars(intervals: Sequence[Interval]) -> Chart:
    """Return the bars of finished and failed tasks."""
    top = _round_up(max((one.finished for one in intervals), default=0))
    step = WIDTH / max(1, len(intervals))
    drawn = [
        Bar(
            round((place + 0.1) * step, 1),
            round(0.8 * step, 1),
            round(HEIGHT * one.finished / top, 1),
            round(HEIGHT * one.failed / top, 1),
            one,
        )
        for place, one in enumerate(intervals)
    ]
    return Chart(top, bars=drawn)


def lines(timings: Sequence[Timing]) -> Chart:
    """Return the lines of the waiting time, median and 95 %; parts without tasks are left out."""
    known = [(place, one.waiting) for place, one in enumerate(timings) if one.waiting is not None]
    top = _round_up(max((waiting.p95 for _, waiting in known), default=0))
    step = WIDTH / max(1, len(timings) - 1)
    drawn = [
        (
            name,
            " ".join(
                f"{place * step:.1f},{HEIGHT - HEIGHT * getattr(waiting, name) / top:.1f}"
                for place, waiting in known
            ),
        )
        for name in ("p95", "p50")
    ]
    return Chart(top, lines=drawn if known else ())


def _round_up(value: float) -> float:
    """Return the next one of 1, 2, 5 and their multiples by powers of ten."""
    if value <= 1:
        return 1
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1.0, 2.0, 5.0, 10.0) if power * step >= value)
