"""The figure by which latencies are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence


def p99(values: Sequence[float]) -> float:
    """Return the smallest value that at least 99 % of all values do not exceed."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]
