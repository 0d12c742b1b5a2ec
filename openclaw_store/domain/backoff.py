"""Backoff: the delay before a failed task is retried."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from openclaw_store.domain.validation import check_number
from openclaw_store.errors import InvalidDataError

Wait = Callable[[int], float]
"""Takes the number of a retry, from 1, and returns the seconds before it."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter: the delay before a failed task is retried.

    The first delay is `first_seconds`; each later one is `factor` times as long, up to
    `longest_seconds`. The share `jitter` of a delay is random, so tasks that failed together are
    not retried together (Marc Brooker, *Exponential Backoff And Jitter*, AWS Architecture Blog,
    2015).

    Args:
        first_seconds: First delay; 0 for none.
        factor: At least 1.
        longest_seconds: Maximum delay.
        jitter: From 0 (no random share) to 1 (the whole delay is random).

    Raises:
        InvalidDataError: If a value is out of range.
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
        """Return the delays of one task, with the random share drawn now."""
        return partial(self.seconds, chance=random.random())

    def seconds(self, retry: int, chance: float) -> float:
        """Return the delay before a retry.

        Args:
            retry: 1 for the first.
            chance: A random number from 0 to 1.
        """
        try:
            grown = float(self.factor) ** (retry - 1)  # an integer would grow without a limit
        except OverflowError:
            grown = sys.float_info.max
        full = min(self.first_seconds * grown, self.longest_seconds)
        return full * (1 - self.jitter * chance)


def check_backoff(backoff: Any) -> Backoff:
    """Return a backoff, or refuse a value of another type."""
    if not isinstance(backoff, Backoff):
        raise InvalidDataError("backoff", f"must be a Backoff, not {type(backoff).__name__}")
    return backoff


DEFAULT_BACKOFF = Backoff()
