"""Backoff: the delay before a failed task is tried again."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from openclaw_store.domain.validation import (
    check_number,
)
from openclaw_store.errors import (
    InvalidDataError,
)

Wait = Callable[[int], float]
"""Gives the seconds before a retry, by its number, from 1."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a task waits before its next try: exponentially longer, with jitter.

    The first retry waits `first_seconds`, each later one `factor` times as long, `longest_seconds`
    at most. Of that, the share `jitter` is random, so that what failed together is not tried again
    together (Marc Brooker, *Exponential Backoff And Jitter*, AWS Architecture Blog, 2015).

    Args:
        first_seconds: Seconds; 0 for at once.
        factor: At least 1.
        longest_seconds: Seconds.
        jitter: From 0 (none) to 1 (the wait is anything up to its full length).

    Raises:
        InvalidDataError: If one of them is out of range.
    """

    first_seconds: float = 1.0
    factor: float = 2.0
    longest_seconds: float = 300.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        for name, greatest in (("first_seconds", 1e9), ("longest_seconds", 1e9), ("jitter", 1.0)):
            check_number(name, getattr(self, name), greatest)
        if check_number("factor", self.factor, 1e9) < 1:
            raise InvalidDataError("factor", f"must be at least 1, not {self.factor!r}")

    def draw(self) -> Wait:
        """How long one task waits, by its retry; what is random of that is drawn now."""
        return partial(self.seconds, chance=random.random())

    def seconds(self, retry: int, chance: float) -> float:
        """Seconds before a retry.

        Args:
            retry: 1 for the first.
            chance: A random number from 0 to 1.
        """
        try:
            grown = float(self.factor) ** (retry - 1)  # of a whole number it has no end
        except OverflowError:
            grown = sys.float_info.max
        full = min(self.first_seconds * grown, self.longest_seconds)
        return full * (1 - self.jitter * chance)


def check_backoff(backoff: Any) -> Backoff:
    """How long a task waits before its next try."""
    if not isinstance(backoff, Backoff):
        raise InvalidDataError("backoff", f"must be a Backoff, not {type(backoff).__name__}")
    return backoff


DEFAULT_BACKOFF = Backoff()
