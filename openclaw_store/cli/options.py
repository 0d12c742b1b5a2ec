"""Options that several commands have: moments, durations, and the selection of tasks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.domain import TaskStatus, TaskType, utc_now

if TYPE_CHECKING:
    from openclaw_store.domain import TaskFilter

_UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}

FILTER_NAMES = (
    "status", "type", "node", "user", "skill", "name", "error", "since", "finished_since",
)  # fmt: skip
"""The options of `selection`."""


def either(kind: type[StrEnum]) -> str:
    """Return the values of an enumeration as a text."""
    *others, last = (member.value for member in kind)
    return f"{', '.join(others)} or {last}"


def moment(text: str | datetime) -> datetime:
    """Return the time of an option: `2026-11-25T09:30+01:00`; without a zone, it is local."""
    try:
        return text if isinstance(text, datetime) else datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time: write 2026-11-25T09:30+01:00") from None


def ago(text: str | datetime) -> datetime:
    """Return the time of an option that is a duration before now, as `1h`, or a time."""
    if isinstance(text, datetime):
        return text
    number, unit = text.strip(), ""
    while number and number[-1].isalpha():
        number, unit = number[:-1], number[-1] + unit
    try:
        return utc_now() - timedelta(**{_UNITS[unit]: float(number)})
    except (KeyError, ValueError, OverflowError):
        try:
            return datetime.fromisoformat(text).astimezone()  # without a zone, it is local
        except ValueError:
            problem = f"{text!r} is neither a duration, as 90s, 30min, 1h or 2d, nor a time"
            raise typer.BadParameter(problem) from None


def time_option(help: str) -> Any:
    """Return an option that is a time."""
    return typer.Option(parser=moment, metavar="TIME", help=help, show_default=False)


def since_option(help: str) -> Any:
    """Return an option that is a duration before now, or a time."""
    return typer.Option(parser=ago, metavar="DURATION", help=help, show_default=False)


Statuses = Annotated[
    list[TaskStatus] | None,
    typer.Option("--status", metavar="STATUS", help=f"{either(TaskStatus)}; may be repeated."),
]
Types = Annotated[
    list[TaskType] | None,
    typer.Option("--type", metavar="TYPE", help=f"{either(TaskType)}; may be repeated."),
]
Node = Annotated[str | None, typer.Option("--node", help="Assigned to this node.")]
User = Annotated[str | None, typer.Option("--user", help="Submitted by this user.")]
Skill = Annotated[str | None, typer.Option("--skill", help="Requiring this skill.")]
Name = Annotated[str | None, typer.Option("--name", help="With this text in the name.")]
Since = Annotated[
    datetime | None, since_option("Submitted in this time, as 1h, or since this time.")
]
Error = Annotated[str | None, typer.Option("--error", help="With this text in the error.")]
FinishedSince = Annotated[
    datetime | None, since_option("Finished in this time, as 1h, or since this time.")
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Identifiers of tasks.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only list what would be changed.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before changing several.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Reason for the change log.")]

Work = Callable[..., Coroutine[Any, Any, None]]


def selecting(work: Work) -> Work:
    """Give a command the options that select tasks, as its argument `filter`."""

    async def run(*arguments: Any, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in FILTER_NAMES}
        await work(*arguments, filter=_filter_of(**chosen), **given)

    signature = inspect.signature(work, eval_str=True)
    own = [one for one in signature.parameters.values() if one.name != "filter"]
    kinds = (Statuses, Types, Node, User, Skill, Name, Error, Since, FinishedSince)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in zip(FILTER_NAMES, kinds, strict=True)
    ]
    own = [own[0], *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own[1:])]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]  # `command` reads it
        parameters=[*own, *added]
    )
    run.__name__, run.__doc__ = work.__name__, work.__doc__
    return run


def _filter_of(
    status: list[TaskStatus] | None,
    type: list[TaskType] | None,
    node: str | None,
    user: str | None,
    skill: str | None,
    name: str | None,
    error: str | None,
    since: datetime | None,
    finished_since: datetime | None,
) -> TaskFilter:
    from openclaw_store.domain import TaskFilter

    return TaskFilter(
        status=status or None,
        task_type=type or None,
        node=node,
        user=user,
        skill=skill,
        name_contains=name,
        error_contains=error,
        submitted_from=since,
        completed_from=finished_since,
    )
