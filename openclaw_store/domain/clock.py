"""Time and identifiers: the only module that asks the system for the time or random bits."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Returns the present moment as an aware datetime in UTC."""

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
# Two characters in one step halve the time of `new_id`.
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_RANDOM_BITS = 52

_lock = threading.Lock()
_last = 0


def utc_now() -> datetime:
    """Return the present moment, aware, in UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """Return a new identifier: 20 characters that sort by time of creation.

    It consists of 48 bits of milliseconds since 1970 and 52 random bits, counted up within one
    millisecond (the monotonic variant of UUIDv7, RFC 9562 section 6.2, shortened), in Crockford's
    base 32. Two processes that each make 1,000 identifiers in the same millisecond collide with a
    probability of 4 in 10^13, and the store then refuses the second one.
    """
    global _last
    milliseconds = int(utc_now().timestamp() * 1000)
    candidate = milliseconds << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    # Several threads may create identifiers at once; each must be greater than all before.
    with _lock:
        if candidate <= _last or candidate >> _RANDOM_BITS == _last >> _RANDOM_BITS:
            candidate = _last + 1
        _last = candidate
    return "".join([_PAIRS[candidate >> shift & 0x3FF] for shift in range(90, -1, -10)])


def _forget_last_id() -> None:
    """Start a forked child from fresh random bits; it must not count like its parent."""
    global _last, _lock
    # Another thread of the parent may have held the lock, which would stay locked for ever.
    _last = 0
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_last_id)
