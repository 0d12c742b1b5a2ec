"""Progress of a running task, as its handler reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from openclaw_store.domain.validation import check_number, check_text, read_time

LONGEST_NOTE = 500
"""Characters of a note that are kept."""


@dataclass(frozen=True)
class Progress:
    """The newest progress of an attempt at a task."""

    attempt: int
    """The attempt; see `Task.attempt`."""
    fraction: float | None
    """The part of the work that is done, 0 to 1; `None` if the handler did not tell."""
    note: str | None
    """A text of the handler, such as `epoch 3`."""
    reported_at: datetime
    """The time of the report, by the clock of the worker."""

    def __str__(self) -> str:
        parts = [None if self.fraction is None else f"{self.fraction:.0%}", self.note]
        return ", ".join(filter(None, parts)) or "no figures"


def progress_of(attempt: int, fraction: float | None, note: str | None, at: datetime) -> Progress:
    """Return checked progress; a long note is cut.

    Raises:
        InvalidDataError: If the fraction is not a number from 0 to 1, or the note is not text.
    """
    if fraction is not None:
        fraction = check_number("fraction", fraction, 1)
    if note is not None:
        note = check_text("note", note)[:LONGEST_NOTE]
    return Progress(attempt, fraction, note, at)


def encode_progress(progress: Mapping[str, Progress]) -> str:
    """Return the progress of tasks, by identifier, as JSON."""
    return orjson.dumps({id: vars(one) for id, one in progress.items()}).decode()


def is_progress(text: Any) -> bool:
    """Return `True` if `decode_progress` can read a stored value."""
    try:
        values: Any = orjson.loads(text)
        for one in values.values():
            read_time("reported_at", one["reported_at"])
            progress_of(one["attempt"], one["fraction"], one["note"], one["reported_at"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def decode_progress(text: str | None, task_id: str, attempt: int) -> Progress | None:
    """Return the progress of an attempt from JSON; `None` if there is none."""
    try:
        values: Any = orjson.loads(text or "{}")[task_id]
        at = read_time("reported_at", values["reported_at"])
        if values["attempt"] == attempt:
            return progress_of(attempt, values["fraction"], values["note"], at)
    except (KeyError, TypeError, ValueError):  # none, or written by hand
        pass
    return None
