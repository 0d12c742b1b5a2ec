"""Retention: how long finished tasks and old changes stay in the database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from openclaw_store.domain.models import TaskStatus
from openclaw_store.domain.validation import check_limit_seconds
from openclaw_store.errors import InvalidDataError, safe_repr

_LONGEST = timedelta(days=36_500)
"""A hundred years, so that every clock can go back by it."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The ages at which finished tasks and old changes leave the database.

    Without an `archive` they are deleted. `None` as an age keeps them. A task that was requeued or
    changed in the meantime stays.

    Raises:
        InvalidDataError: If an age is no `timedelta` from 0, or all ages are `None`; it names the
            field.
    """

    completed: timedelta | None = None
    """Age of completed tasks, from their end."""
    failed: timedelta | None = None
    """Age of tasks that failed or timed out."""
    cancelled: timedelta | None = None
    """Age of cancelled tasks."""
    history: timedelta | None = None
    """Age of the changes in the feed; tasks and nodes stay."""
    archive: str | Path | None = None
    """A folder, or the URL of one in an object store such as S3."""
    load: float = 0.5
    """Largest share of the time in which the work runs, above 0; at 1 it never rests."""
    interval_seconds: float = 3600
    """Seconds between two runs of a `StateManager`."""

    def __post_init__(self) -> None:
        ages = {
            name: getattr(self, name) for name in ("completed", "failed", "cancelled", "history")
        }
        if all(age is None for age in ages.values()):
            raise InvalidDataError("retention", f"has no age: give one of {', '.join(ages)}")
        for name, age in ages.items():
            if age is not None and not (
                isinstance(age, timedelta) and timedelta(0) <= age <= _LONGEST
            ):
                reason = f"must be a timedelta from 0 to {_LONGEST.days} days, or None"
                raise InvalidDataError(name, f"{reason}, not {safe_repr(age)}")
        if self.archive is not None and not isinstance(self.archive, str | Path):
            raise InvalidDataError("archive", f"must be a path, not {safe_repr(self.archive)}")
        check_limit_seconds("interval_seconds", self.interval_seconds)
        if check_limit_seconds("load", self.load) > 1:
            raise InvalidDataError("load", f"must be at most 1, not {self.load}")

    def cutoffs(self, now: datetime) -> Mapping[TaskStatus, datetime]:
        """Return the time before which a task of each status ended that leaves."""
        ages = {
            TaskStatus.COMPLETED: self.completed,
            TaskStatus.FAILED: self.failed,
            TaskStatus.TIMEOUT: self.failed,
            TaskStatus.CANCELLED: self.cancelled,
        }
        return {status: now - age for status, age in ages.items() if age is not None}
