"""How the command line shows things: as tables for people, as JSON for programs.

What draws tables is imported where something is drawn: a command that fails, and `--help`, need
not wait for it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from openclaw_store.errors import StoreError
from openclaw_store.maintenance.progress import Report

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from openclaw_store.domain import Change, NodeInfo, Task
    from openclaw_store.maintenance.doctor import Finding
    from openclaw_store.maintenance.summary import Summary
    from openclaw_store.maintenance.verify import Problem, Verification

_WIDEST = 1000
"""Columns of what is no terminal: a program, or a file, shall have whole lines."""


def one_line(error: StoreError) -> str:
    """What an error says, with what was noted on it, in one line."""
    notes: Sequence[str] = getattr(error, "__notes__", ())
    return printable(" ".join(f"{'; '.join([str(error), *notes])}".split()))


def printable(text: str) -> str:
    """Text without what would move the cursor of a terminal, or worse."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def size(count: float) -> str:
    """A number of bytes: `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(moment: datetime | None, now: datetime) -> str:
    """How long ago something was: `2 h 5 min`."""
    return "never" if moment is None else duration(now - moment)


def duration(length: timedelta) -> str:
    """A length of time in its two largest units: `2 h 5 min`."""
    minutes, seconds = divmod(max(0, round(length.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])


def when(moment: datetime | None) -> str:
    """A moment in UTC: `2026-11-25 09:42:57`."""
    return "" if moment is None else moment.replace(tzinfo=None).isoformat(" ", "seconds")


def counted(counts: dict[str, int]) -> str:
    """Numbers by status: `3: 2 online, 1 offline`."""
    there = [f"{count:,} {name}" for name, count in counts.items() if count and name != "total"]
    return f"{counts['total']:,}" + (f": {', '.join(there)}" if there else "")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without lines; the last column is broken where there is no room for it."""
    from rich.table import Table

    safe_repr = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for place, header in enumerate(headers):
        is_last = place == len(headers) - 1
        safe_repr.add_column(header, no_wrap=not is_last, overflow="fold")
    for row in rows:
        safe_repr.add_row(*(printable(str("" if cell is None else cell)) for cell in row))
    return safe_repr


def summary(found: Summary) -> Table:
    """A database at a glance."""
    now, waiting = found.read_at, found.oldest_waiting
    where = f"{found.dialect}, {size(found.size)}, schema {found.schema}"
    rows = [
        ("database", f"{found.database} ({where})"),
        ("nodes", counted(found.nodes)),
        ("tasks", counted(found.tasks)),
        (
            "oldest waiting",
            "none"
            if waiting is None
            else f"{waiting.task_id} ({waiting.name}), {waiting.status.value} for "
            f"{age(waiting.submitted_at, now)}",
        ),
        (
            "newest change",
            f"revision {found.revision:,}, {age(found.changed_at, now)} ago"
            if found.changed_at
            else "none",
        ),
        (
            "newest heartbeat",
            f"{age(found.heartbeat_at, now)} ago" if found.heartbeat_at else "none",
        ),
    ]
    return table(("", ""), rows)


def nodes(found: Iterable[NodeInfo], now: datetime) -> Table:
    """Nodes, a line each."""
    headers = ("node", "status", "tasks", "cpu", "memory", "disk", "heartbeat", "skills")
    return table(
        headers,
        (
            (
                node.node_id,
                node.status.value,
                f"{node.running_tasks}/{node.max_concurrent_tasks}",
                *(f"{x:.0f} %" for x in (node.cpu_usage, node.memory_usage, node.disk_usage)),
                "never" if node.last_heartbeat is None else f"{age(node.last_heartbeat, now)} ago",
                ", ".join(node.available_skills),
            )
            for node in found
        ),
    )


def tasks(found: Iterable[Task]) -> Table:
    """Tasks, a line each."""
    headers = ("task", "status", "priority", "submitted (UTC)", "node", "name")
    return table(
        headers,
        (
            (
                task.task_id,
                task.status.value,
                task.priority.name.lower(),
                when(task.submitted_at),
                task.assigned_node,
                task.name,
            )
            for task in found
        ),
    )


def fields(item: Task | NodeInfo) -> Table:
    """A task or a node, a field a line; what is empty is left out."""
    import orjson

    def safe_repr(value: Any) -> str:
        if isinstance(value, datetime):
            return f"{when(value)} UTC"
        if isinstance(value, list | dict):
            return orjson.dumps(value).decode()
        return str(value)

    rows = [
        (name, value.name.lower() if name == "priority" else safe_repr(value))
        for name, value in vars(item).items()
        if value not in (None, "", [], {})
    ]
    return table(("", ""), rows)


def changes(found: Iterable[Change], *, of_one: bool = False) -> Table:
    """Changes, a line each.

    Args:
        of_one: Whether all of them are of one task or node.
    """
    headers = ("revision", "time (UTC)", *(() if of_one else ("", "id")), "change")
    return table(
        headers,
        (
            (
                change.revision,
                when(change.changed_at),
                *(() if of_one else (change.item, change.item_id)),
                transition(change),
            )
            for change in found
        ),
    )


def problems(found: Iterable[Problem]) -> Table:
    """What `verify` has found, a line each."""
    headers = ("invariant", "", "problem")
    return table(
        headers,
        (
            (
                problem.invariant,
                "repaired" if problem.is_repaired else "can be repaired" if problem.is_safe else "",
                problem.text,
            )
            for problem in found
        ),
    )


def findings(found: Iterable[Finding]) -> Table:
    """What `doctor` has found, a line each, and another one for what to do."""
    rows: list[tuple[str, str, str]] = []
    for finding in found:
        rows.append((finding.level.value, finding.name, finding.text))
        if finding.advice:
            rows.append(("", "", f"→ {finding.advice}"))
    return table(("", "", ""), rows)


def verdict(found: Verification) -> str:
    """What `verify` has found, in one line."""
    left = [problem for problem in found.problems if not problem.is_repaired]
    safe = sum(problem.is_safe for problem in left)
    repaired = len(found.problems) - len(left)
    parts = [
        f"{sum(found.checked.values()):,} values were checked",
        "no problem is left" if found else number(len(left) + found.omitted, "problem is", "left"),
        *([number(repaired, "problem was", "repaired")] if repaired else []),
        *([f"verify --repair puts {safe:,} of them right"] if safe else []),
    ]
    return "; ".join(parts)


def number(count: int, what: str, verb: str = "") -> str:
    """How many there are of something: `1 task was removed`, `2 tasks were removed`."""
    noun, _, auxiliary = what.partition(" ")
    if count != 1:
        noun, auxiliary = f"{noun}s", {"is": "are", "was": "were"}.get(auxiliary, auxiliary)
    return " ".join(filter(None, [f"{count:,}", noun, auxiliary, verb]))


def transition(change: Change) -> str:
    """What a change was: `running → failed on atlas (no paper)`."""
    steps = " → ".join(filter(None, dict.fromkeys([change.from_status, change.to_status])))
    kind = f", {change.kind.value}" if change.kind.value in ("updated", "removed") else ""
    node = f" on {change.node}" if change.node else ""
    reason = f" ({change.reason})" if change.reason else ""
    return f"{steps}{kind}{node}{reason}"


def line(change: Change) -> str:
    """A change in one line, for what is no terminal."""
    what = f"{change.item} {change.item_id}: {transition(change)}"
    return printable(f"{when(change.changed_at)} {change.revision} {what}")


def as_json(document: Any, *, compact: bool = False) -> str:
    """A document as JSON: tasks and nodes as `to_dict` gives them, other things likewise."""
    import orjson

    options = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
    if not compact:
        options |= orjson.OPT_INDENT_2
    return orjson.dumps(document, _plain, options).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def screen() -> Console:
    """What is written on; where it is no terminal, lines are never broken."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = _WIDEST
    return console


def show(*parts: RenderableType) -> None:
    """Write tables and text."""
    console = screen()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    for text in captured.get().splitlines():
        sys.stdout.write(f"{text.rstrip()}\n")


@contextmanager
def progress(text: str) -> Iterator[Report]:
    """A bar while something takes long, on the error output if it is a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar, doing = bars.add_task(text, total=None), text

        def report(what: str, done: int, total: int) -> None:
            nonlocal bar, doing
            if what != doing:
                bars.remove_task(bar)
                bar, doing = bars.add_task(what, total=None), what
            bars.update(bar, completed=done, total=total or None)

        yield report
