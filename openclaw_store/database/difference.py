"""One difference between the schema of a database and the models, with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """A part of the schema that is not as the models describe it."""

    text: str
    """The difference as a clause: `it lacks the index ix_tasks_status`."""
    remedy: Sequence[str] = ()
    """The SQL statements that remove it; none if only a backup helps."""
    is_safe: bool = False
    """Whether the statements keep all content, and drop nothing that the library did not make."""
    is_blocking: bool = True
    """Whether the rows cannot be read, or reading them may run the code of another role."""
    invariant: str = "schema"
    """The invariant of `verify` that it breaks."""
    otherwise: str = "restore a backup"
    """The action to take if no statement removes it."""

    @property
    def advice(self) -> str:
        """The action to take."""
        return "; ".join(self.remedy) or self.otherwise
