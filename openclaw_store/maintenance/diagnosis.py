"""The findings of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    """The store works, but not well, or not for long."""
    ERROR = "error"
    """The store does not work, or its promises do not hold."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    text: str
    """The observation as a sentence."""
    advice: str | None = None
    """The action to take."""


def judge(
    name: str,
    is_good: bool,
    text: str,
    advice: str,
    level: Level = Level.WARNING,
    otherwise: str | None = None,
) -> Finding:
    """Make a finding; `otherwise` replaces `text` if it is not good."""
    if is_good:
        return Finding(name, Level.OK, text)
    return Finding(name, level, otherwise or text, advice)
